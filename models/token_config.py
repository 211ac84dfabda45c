"""Which settings of a token transformer belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

Kind = Literal["two_pass", "masked", "causal", "scales"]
Mixing = Literal["attention", "linear"]
Turning = Literal["grid", "muted", "line"]
Attention = Literal["softmax", "lina"]

# What `forward` takes beside tokens and text.
EXTRA = {"two_pass": "order=", "masked": "known=", "causal": "tokens alone", "scales": "the scales' inputs alone"}


def check_attention(attention: str, kind: str, grid: Sequence[int], turning: str, learned_positions: bool) -> None:
    """Linear attention sees the whole grid in every pass, and no places but those in the tokens themselves."""
    if attention not in get_args(Attention):
        raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, got {attention!r}")
    fits = kind == "masked" and len(grid) == 2 and turning == "grid" and learned_positions
    if attention == "lina" and not fits:
        raise ValueError(
            'attention "lina" is for kind "masked" on a grid of rows and columns, with learned_positions and turning '
            f'"grid"; got {kind!r}, {tuple(grid)}, learned_positions={learned_positions} and {turning!r}'
        )


def check_config(
    kind: str,
    grid: Sequence[int],
    cross: int,
    scale_sides: Sequence[int] | None,
    token_channels: int | None,
    mixing: str,
    turning: str,
    adaptive: bool,
    num_classes: int | None,
) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if (kind == "two_pass") != (cross > 0):
        raise ValueError(f'num_cross_layers is for kind "two_pass" (at least 1) alone; kind "{kind}" got {cross}')
    if (kind == "scales") != (scale_sides is not None):
        raise ValueError(f'scale_sides is for kind "scales" alone, which needs it; kind "{kind}" got {scale_sides}')
    if mixing not in get_args(Mixing) or (mixing == "linear" and kind != "scales"):
        raise ValueError(
            f'scale_mixing must be "attention", or "linear" for kind "scales", got {mixing!r} for {kind!r}'
        )
    if kind == "scales" and token_channels is None:
        raise ValueError('kind "scales" sees maps of the codec: give token_channels, the length of its codes')
    if scale_sides is not None and tuple(grid) != (scale_sides[-1],) * 2:
        raise ValueError(f"grid must be the last scale, {(scale_sides[-1],) * 2}, got {tuple(grid)}")
    if turning not in get_args(Turning) or (turning == "line" and kind != "masked"):
        raise ValueError(f'turning must be "grid", "muted", or "line" for kind "masked", got {turning!r} for {kind!r}')
    if adaptive and (kind != "scales" or mixing != "attention" or num_classes is None):
        raise ValueError(
            f'adaptive layers are for kind "scales" with scale_mixing "attention" and num_classes, got {kind!r}, '
            f"{mixing!r} and {num_classes}"
        )
