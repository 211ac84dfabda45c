"""How many tokens are decided at each step: the first of the three parts of token sampling (counts, order, head).

A count schedule is a function (n_tokens, n_steps) -> list of n_steps positive integers that add up to n_tokens. The
numbers are Python integers, known before the first step, so a whole decoding has fixed shapes and can be captured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from .schedules import check_count

CountSchedule = Callable[[int, int], list[int]]
Curve = Literal["arccos", "cosine", "linear"]

CURVES: dict[str, Callable[[float], float]] = {
    "arccos": lambda r: 2 / math.pi * math.acos(r),
    "cosine": lambda r: math.cos(math.pi * r / 2),
    "linear": lambda r: 1 - r,
}


def share_counts(n_tokens: int, n_steps: int) -> list[int]:
    """MaskGIL's: step k decides a share of the tokens in proportion to w_k = (2 / pi) arccos(1 - k / (n_steps - 1)).

    Few at first, when little is known; every step decides at least one.

    Source: MaskGIT, Chang et al. 2022 (arXiv:2202.04200), with the arccos schedule as MaskGIL publishes it.

    Raises:
        ValueError: n_steps is not from 1 to n_tokens.
    """
    _check(n_tokens, n_steps)
    weights = [CURVES["arccos"](1 - k / (n_steps - 1)) for k in range(n_steps)] if n_steps > 1 else [1.0]
    counts: list[int] = []
    for k, weight in enumerate(weights[:-1]):
        most = n_tokens - sum(counts) - (n_steps - 1 - k)
        counts.append(max(1, min(most, round(n_tokens * weight / sum(weights)))))
    return [*counts, n_tokens - sum(counts)]


def curve_counts(n_tokens: int, n_steps: int, curve: Curve = "arccos") -> list[int]:
    """ARPG's and MAR's: after step k, a share m((k + 1) / n_steps) of the tokens is left.

    Every step decides at least one, and the last leaves none (ARPG's published clamp leaves one undecided).

    Source: ARPG, Li et al. 2025 (arXiv:2503.10568), m = "arccos"; MAR, Li et al. 2024 (arXiv:2406.11838), m = "cosine".

    Args:
        n_tokens, n_steps: how many tokens in how many steps.
        curve: "arccos" (2 / pi arccos r), "cosine" (cos(pi r / 2)) or "linear" (1 - r, the same number at each step).

    Raises:
        ValueError: n_steps is not from 1 to n_tokens, or an unknown curve.
    """
    _check(n_tokens, n_steps)
    if curve not in CURVES:
        raise ValueError(f"curve must be one of {', '.join(CURVES)}, got {curve!r}")
    left, counts = n_tokens, []
    for k in range(n_steps):
        # 1e-9: in floats 0.3 * 10 falls short of 3, and a floor would make that a token.
        wanted = math.floor(n_tokens * CURVES[curve]((k + 1) / n_steps) + 1e-9)
        after = max(n_steps - 1 - k, min(left - 1, wanted))
        counts.append(left - after)
        left = after
    return counts


def cosine_counts(n_tokens: int, n_steps: int) -> list[int]:
    """`curve_counts` with MAR's cosine, as a count schedule."""
    return curve_counts(n_tokens, n_steps, "cosine")


def even_counts(n_tokens: int, n_steps: int) -> list[int]:
    """As nearly as possible the same number at each step; one each if there are as many steps as tokens (raster)."""
    return curve_counts(n_tokens, n_steps, "linear")


def block_counts(blocks: Sequence[int], steps_per_block: int, inner: CountSchedule = curve_counts) -> list[int]:
    """Block after block, each decided in `steps_per_block` steps (a smaller block in as many as it has tokens).

    With one step per block this is next-block prediction (arXiv:2502.07737): semi-autoregressive over frames or rows.

    Args:
        blocks: tokens left to decide in each block, in the order of the blocks; blocks with none are left out.
        steps_per_block: at least 1.
        inner: the schedule inside a block.
    """
    check_count(steps_per_block, "steps_per_block")
    return [count for size in blocks if size for count in inner(size, min(steps_per_block, size))]


def _check(n_tokens: int, n_steps: int) -> None:
    check_count(n_tokens, "n_tokens")
    if not 1 <= n_steps <= n_tokens:
        raise ValueError(
            f"n_steps must be from 1 to {n_tokens}, the number of tokens to decide (each step decides one or more), "
            f"got {n_steps}"
        )
