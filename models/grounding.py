"""Grounding beside the prompt instead of before it (ReGround), for GLIGEN's networks in diffusers.

GLIGEN puts a gated attention to boxes and their names between self-attention and the attention to the prompt, which
then sees a picture that the boxes have already changed, and words are lost. ReGround lets both see the same picture and
adds what they say; no weight changes. Source: ReGround, Lee et al. 2024 (arXiv:2403.13589).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Reground:
    """Grounding and prompt in parallel in all blocks of a network that has both, until `undo`.

    Args:
        network: a diffusers UNet with `attention_type="gated"`, such as GLIGEN's.

    Raises:
        ValueError: no block of the network is grounded.
    """

    def __init__(self, network: Any) -> None:
        blocks = [block for block in network.modules() if hasattr(block, "fuser") and hasattr(block, "attn2")]
        if not blocks:
            raise ValueError(
                f"this {type(network).__name__} has no gated grounding; load one that has, such as GLIGEN's UNet"
            )
        self._hooks = [hook for block in blocks for hook in _in_parallel(block)]

    def undo(self) -> None:
        """One after the other again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _in_parallel(block: Any) -> list[Any]:
    said: list[Tensor] = []

    def held_back(_: Any, given: tuple[Any, ...], grounded: Tensor) -> Tensor:
        said[:] = [grounded - given[0]]
        return given[0]

    def added(_: Any, given: Any, told: Tensor) -> Tensor:
        return told + said.pop() if said else told

    return [block.fuser.register_forward_hook(held_back), block.attn2.register_forward_hook(added)]
