"""The one attention of the library: dense by PyTorch's kernels, block-sparse by a plan, merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .dense import attend_blocks, attend_dense, attend_dense_with_lse
from .masks import BoxMask, Mask, RowMask, causal_frames, window_mask
from .plan import BlockPlan, KVSummary, Permutation
from .quantize import Quantize
from .reference import merge_reference
from .sparse import attend_plan, merge_pairs, merges_fast

__all__ = [
    "BlockPlan",
    "BoxMask",
    "KVSummary",
    "Mask",
    "Permutation",
    "RowMask",
    "attend",
    "causal_frames",
    "merge",
    "window_mask",
]


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | None = None,
    *,
    mask: Tensor | BlockMask | None = None,
    scale: float | None = None,
    quantize: Quantize | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | None = None,
    *,
    mask: Tensor | BlockMask | None = None,
    scale: float | None = None,
    quantize: Quantize | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | None = None,
    *,
    mask: Tensor | BlockMask | None = None,
    scale: float | None = None,
    quantize: Quantize | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, `softmax(q k^T * scale) v`, over tokens-first tensors.

    With a plan only the key blocks that it lists are visited: by a Triton kernel on CUDA, and by a reference in plain
    PyTorch elsewhere. Both have gradients; those of centroids, tables and learned biases are the reference's alone.

    Without a plan this is PyTorch's `scaled_dot_product_attention` on transposed views: no copy is made. With
    `return_lse` PyTorch's flash and memory-efficient kernels are asked for their log-sum-exp; where they cannot give it
    (a gradient is wanted, an unusual head size, another device) a reference computes it over chunks of keys, in memory
    that does not grow with their number.

    Args:
        q: queries [B, Lq, H, D], any floating dtype.
        k: keys [B, Lk, H, D], dtype and device of `q`. `Lk` may be 0.
        v: values, shaped like `k`.
        plan: which key blocks each query block visits (see `BlockPlan` and `millstream.kernels.planners`).
        mask: for dense attention, since a plan has its own: bool, broadcastable to [B, H, Lq, Lk]; True where a query
            sees a key. Keys that no query sees must still be finite, since 0 * NaN is NaN. None: every query sees every
            key. Or FlexAttention's `BlockMask`, which skips what is hidden; it is meant for compiled training and gives
            no log-sum-exp here.
        scale: multiplies the scores; None means D ** -0.5.
        quantize: "fp8" or "int8" multiplies in 8 bits, with a scale per block of the plan; refused without a plan.
        return_lse: also return the log-sum-exp of the scaled scores, so that `merge` can join this result to others.

    Returns:
        The output [B, Lq, H, D] in `q`'s dtype; with `return_lse` the pair (output, lse), lse float32 [B, H, Lq] by the
        natural logarithm. A query that sees no key gets output 0 and lse -inf.

    Raises:
        ValueError: shapes that do not belong together, or a plan made for others. TypeError: dtypes that differ, or a
            mask that is not bool.
    """
    _check(q, k, v, mask)
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if plan is not None:
        if mask is not None:
            raise ValueError("attend got a plan and a mask; put the mask into the plan, which alone says what is seen")
        out, lse = attend_plan(q, k, v, plan, scale, quantize)
        return (out, lse) if return_lse else out
    if quantize is not None:
        raise ValueError(f"quantize={quantize!r} needs a plan; BlockPlan.dense(...) visits every block")
    if isinstance(mask, BlockMask):
        if return_lse:
            raise TypeError("return_lse needs a bool mask, got a BlockMask")
        return attend_blocks(q, k, v, mask, scale)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape).expand(-1, -1, -1, k.shape[1])
    if k.shape[1] == 0:
        out = torch.zeros_like(q)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=torch.float32)
        return (out, lse) if return_lse else out
    if return_lse:
        return attend_dense_with_lse(q, k, v, mask, scale)
    return attend_dense(q, k, v, mask, scale)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join attention results over disjoint sets of keys into the result over all of them.

    Each part is weighted by exp(lse_part - lse_total) (FlashAttention, arXiv 2205.14135, section 3.1), so
    `merge([attend(q, k1, v1, return_lse=True), attend(q, k2, v2, return_lse=True)])` equals attending to both at once.
    Adding a constant to a part's lse equals adding it to every score of that part.

    Args:
        parts: one or more pairs (out [B, L, H, D], lse [B, H, L]), as `attend(..., return_lse=True)` gives them. A row
            without keys, (0, -inf), takes no part.

    Returns:
        (out [B, L, H, D] in the first part's dtype, lse [B, H, L]).

    Raises:
        ValueError: no parts, or parts of different shapes.
    """
    if not parts:
        raise ValueError("merge got no parts; give it at least one (out, lse) pair")
    shape = parts[0][0].shape
    for out, lse in parts:
        if out.shape != shape or lse.shape != (shape[0], shape[2], shape[1]):
            raise ValueError(
                f"every part must be (out [B, L, H, D], lse [B, H, L]) with out {list(shape)} as in the first part, "
                f"got out {list(out.shape)} and lse {list(lse.shape)}"
            )
    return merge_pairs(parts) if len(parts) > 1 and merges_fast(parts) else merge_reference(parts)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            "attend wants q [B, Lq, H, D] and k, v [B, Lk, H, D] of the same B, H and D, "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them first")
    if mask is None or isinstance(mask, BlockMask):
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True where a query sees a key), got {mask.dtype}")
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if mask.ndim > 4 or any(m not in (1, n) for m, n in zip(reversed(mask.shape), reversed(full), strict=False)):
        raise ValueError(f"mask must be broadcastable to [B, H, Lq, Lk] = {list(full)}, got {list(mask.shape)}")
