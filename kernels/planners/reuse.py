"""Reuse across denoising steps: of attention's result outside a chunk, and of a pattern of blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..attention import BlockPlan, attend, merge
from .scores import block_scores


class FlashBlock:
    """FlashBlock (arXiv 2602.05305): attention to everything outside the chunk is computed at its first step and kept.

    Later steps attend inside the chunk and merge. The kept part is (out, lse) per layer. It is an approximation from
    the second step on: the queries change, the kept part does not.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor] | None] = {}

    def attend(
        self,
        layer: int,
        q: Tensor,
        inside: tuple[Tensor, Tensor],
        outside: tuple[Tensor, Tensor] | Sequence[tuple[Tensor, ...]],
        *,
        first: bool,
        plan: BlockPlan | Callable[[Tensor, Tensor], BlockPlan | None] | None = None,
        attend: Callable[..., Any] = attend,
    ) -> Tensor:
        """Attention of q to `inside` (k, v) and `outside` (k, v), or pieces of it, or none; all [B, L, H, D].

        Args:
            outside: a piece of which not all is seen has a third part, a mask as `attend` takes it.
            plan: of the outside part at the first step, or what makes it for a piece from (q, k).
            attend: what attends, with the arguments of `kernels.attend`.
            first: compute and keep the outside part; otherwise it is taken as kept, and `outside` is not read.

        Raises:
            RuntimeError: a later step of a layer that kept nothing.
        """
        if first:
            alone = len(outside) == 2 and isinstance(outside[0], Tensor)
            pieces: Any = [outside] if alone else outside
            plans = [plan(q, piece[0]) if callable(plan) else plan for piece in pieces]
            parts = [
                attend(q, k, v, plan, mask=mask[0] if mask else None, return_lse=True)
                for (k, v, *mask), plan in zip(pieces, plans)
            ]
            self._kept[layer] = merge(parts) if parts else None
        elif layer not in self._kept:
            raise RuntimeError(
                f"layer {layer} has kept nothing yet; call attend(..., first=True) at a chunk's first step"
            )
        kept = self._kept[layer]
        if kept is None:
            return attend(q, *inside)
        return merge([attend(q, *inside, return_lse=True), kept])[0]


class SparseD:
    """SparseD (arXiv 2509.24014): full attention in the first steps, then one pattern per head for all later ones.

    Args:
        skip: steps with full attention (20 % of them in the source); the pattern is made at the last of them.
        select: share of blocks in the pattern (0.3 in the source).
        block: block size.
    """

    def __init__(self, skip: int, select: float = 0.3, block: int = 128) -> None:
        self.skip, self.select, self.block = skip, select, block
        self._plans: dict[int, BlockPlan] = {}

    def plan(self, layer: int, step: int, q: Tensor, k: Tensor) -> BlockPlan | None:
        """The plan of `layer` at `step` (from 0); None: attend fully. *Surrogate*: blocks are ranked by their means."""
        if step < self.skip:
            self._plans.pop(layer, None)
            return None
        if layer not in self._plans:
            scores = block_scores(q, k, (self.block, self.block))
            count = round(self.select * scores.shape[-1])
            self._plans[layer] = BlockPlan.best(scores, count, (self.block, self.block), k.shape[1])
        return self._plans[layer]


def refreshed(make: Callable[[Tensor, Tensor], BlockPlan], every: int) -> Callable[[int, Tensor, Tensor], BlockPlan]:
    """A planner whose plan is made anew only at every `every`-th step: `planner(step, q, k)`."""
    kept: list[BlockPlan] = []

    def planner(step: int, q: Tensor, k: Tensor) -> BlockPlan:
        if step % every == 0 or not kept:
            kept[:] = [make(q, k)]
        return kept[0]

    return planner
