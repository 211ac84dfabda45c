"""`attend` under a plan: what is asked is checked once, tokens are put in order, and a backend is chosen."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from ..backend import runs_triton
from .masks import BoxMask, RowMask
from .plan import BlockPlan, KVSummary
from .quantize import Quantize, Quantized, dequantize, quantize_attention
from .sparse_reference import attend_plan_reference

HEAD_DIMS = (16, 32, 64, 128)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attend_plan(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, quantize: Quantize | None
) -> tuple[Tensor, Tensor]:
    """Returns (out [B, L, H, D], lse float32 [B, H, L])."""
    _check_plan(q, k, plan, scale, quantize)
    if plan.permutation is not None and plan.permutation.k_source is not None:
        k, v = (take_slots(x, plan.permutation.k_source) for x in (k, v))
    summary = plan.summary
    if plan.rest == "centroid" and summary is None:
        lengths = None if plan.lengths is None else plan.lengths[1]
        summary = KVSummary.of(
            k, v, plan.block[1], lengths=lengths, table=plan.table, first_order=plan.first_order
        )  # fmt: skip
    fast = _runs_fast(q, k, v, plan)
    if fast and _graded(q, k, v) and plan.permutation is not None and plan.permutation.q_source is not None:
        return _in_slots(q, k, v, plan, scale)
    if quantize is None:
        return attend_triton(q, k, v, plan, summary, scale) if fast else _reference(q, k, v, plan, summary, scale)
    eight = quantize_attention(q if fast else q.detach(), k.detach(), v.detach(), plan.block, quantize)
    if summary is not None:
        shifted = summary.key - eight.mean_key[:, :, None].to(summary.key.dtype)
        summary = KVSummary(shifted, summary.value, summary.count, summary.slope)
    if fast:
        out, lse = attend_triton(eight.q, eight.k, eight.v, plan, summary, scale, eight, q.dtype)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        parts = dequantize(eight, plan.block, wide)
        out, lse = attend_plan_reference(*parts, plan, summary, scale, round_p=quantize == "fp8")
        out = out.to(q.dtype)
    return out, lse + scale * torch.einsum("blhd,bhd->bhl", q.float(), eight.mean_key)


def merges_fast(parts: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the parts, and what is done with them, are the Triton kernel's."""
    out, lse = parts[0]
    graded = torch.is_grad_enabled() and any(x.requires_grad for part in parts for x in part)
    usual = out.shape[-1] in HEAD_DIMS and out.dtype in TRITON_DTYPES and lse.dtype == torch.float32
    return runs_triton(out) and not graded and usual and out.numel() > 0


def merge_pairs(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Parts joined two by two, in float32 until the last, by one kernel each."""
    from .merge_triton import merge_operator

    dtype = parts[0][0].dtype
    with torch.cuda.device_of(parts[0][0]):
        out, lse = parts[0] if len(parts) == 2 else (parts[0][0].float(), parts[0][1])
        for other, other_lse in parts[1:]:
            out, lse = merge_operator(out, lse, other, other_lse)
    return out.to(dtype), lse


def take_slots(x: Tensor, source: Tensor) -> Tensor:
    """x [B, L, H, D] in slot order [B, slots, H, D]; padding holds another token, which the plan's lengths hide."""
    batch, tokens, heads, dim = x.shape
    if source.shape[0] == source.shape[1] == 1:
        return x.index_select(1, source[0, 0].clamp_min(0).long())
    source = source.expand(batch, heads, -1).transpose(1, 2)  # [B, slots, H]
    base = torch.arange(batch, device=x.device)[:, None, None] * tokens
    token = (base + source.clamp_min(0)) * heads + torch.arange(heads, device=x.device)
    return x.reshape(-1, dim).index_select(0, token.flatten()).view(*source.shape, dim)


def _in_slots(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Queries put in order before the kernel and its output after it, by what has gradients; k and v are in order."""
    assert plan.permutation is not None
    source = plan.permutation.q_source
    assert source is not None
    batch, tokens, heads, dim = q.shape
    in_order = replace(plan, permutation=replace(plan.permutation, q_source=None))
    out, lse = attend_triton(take_slots(q, source), k, v, in_order, None, scale)
    slots = torch.arange(source.shape[-1], device=q.device).expand(source.shape)
    place = torch.full((*source.shape[:2], tokens + 1), -1, device=q.device)
    place = place.scatter(2, torch.where(source < 0, tokens, source).long(), slots)[..., :tokens]
    place = place.expand(batch, heads, -1)
    known, place = place >= 0, place.clamp_min(0)
    out = out.transpose(1, 2).gather(2, place[..., None].expand(-1, -1, -1, dim)).masked_fill(~known[..., None], 0.0)
    return out.transpose(1, 2), lse.gather(2, place).masked_fill(~known, -torch.inf)


def _graded(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, summary: KVSummary | None, scale: float
) -> tuple[Tensor, Tensor]:
    return attend_plan_reference(q, k, v, plan, summary, scale)


def attend_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    summary: KVSummary | None,
    scale: float,
    eight: Quantized | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    from .launch import operator

    with torch.cuda.device_of(q):  # Triton launches on the current device, wherever its tensors are
        return operator(*operands(q, k, v, plan, summary, scale, eight, dtype))


def operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    summary: KVSummary | None,
    scale: float,
    eight: Quantized | None = None,
    dtype: torch.dtype | None = None,
) -> tuple:
    """What `launch.attend_blocks` takes: the plan's tensors as the kernel walks them."""
    batch, heads = q.shape[0], q.shape[2]
    indices, places = plan.indices, None
    if plan.table is not None:
        # Looked up here, for Triton cannot load ahead through two tables.
        table = plan.table.long()[:, None, None].expand(-1, indices.shape[1], indices.shape[2], -1)
        spread = indices.expand(max(table.shape[0], indices.shape[0]), -1, -1, -1).long()
        places = table.expand(spread.shape[0], -1, -1, -1).gather(-1, spread).to(torch.int32)
    bias = plan.bias
    if bias is not None and bias.ndim == 3:
        bias = bias[:, :, None]
    rows = plan.mask if isinstance(plan.mask, RowMask) else None
    box = plan.mask if isinstance(plan.mask, BoxMask) else None if rows is None else rows.box
    bits = None if rows is None else rows.bits.contiguous()
    low, high = (None, None) if box is None else (box.low.contiguous(), box.high.contiguous())
    mean_k = mean_v = log_count = listed = slope = None
    if plan.rest == "centroid":
        assert summary is not None
        kind = dtype or q.dtype
        mean_k, mean_v = (x.to(kind).contiguous() for x in (summary.key, summary.value))
        blocks = mean_k.shape[2]
        log_count = summary.count.float().log().expand(batch, heads, -1).contiguous()
        listed = plan.listed(blocks).expand(batch, heads, -1, -1).to(torch.uint8).contiguous()
        slope = None if summary.slope is None else summary.slope.to(kind).contiguous()
    source = None if plan.permutation is None else plan.permutation.q_source
    lengths = plan.lengths or (None, None)
    return (
        *(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k)), v if v.stride(-1) == 1 else v.contiguous(),
        _row_major(indices), _row_major(plan.n_full), _row_major(plan.n_masked), places,
        *(None if x is None else _row_major(x) for x in lengths), None if bias is None else bias.contiguous(),
        None if source is None else _row_major(source), low, high, None if box is None else box.at.contiguous(), bits,
        mean_k, mean_v, log_count, listed, slope,
        None if eight is None else eight.q_scale, None if eight is None else eight.k_scale,
        None if eight is None else eight.v_scale,
        scale, plan.block[0], plan.block[1], -(2**31 - 2) if box is None else box.sinks,
        0 if box is None else box.guard,
        plan.permutation is not None and plan.permutation.k_source is not None, dtype or q.dtype,
    )  # fmt: skip


def _row_major(x: Tensor) -> Tensor:
    """Broadcast dimensions may stay, but each list must lie in one piece."""
    return x if x.is_contiguous() else x.contiguous()


def _runs_fast(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> bool:
    if not runs_triton(q):
        return False
    learned = plan.bias is not None and plan.bias.requires_grad
    if _graded(q, k, v) and (plan.rest == "centroid" or plan.table is not None or learned):
        return False  # of which the kernel has no gradient; the reference is differentiable, and compiles
    if k.shape[1] == 0 or q.shape[1] == 0:
        return False
    why = _refusal(q.device, q.dtype, q.shape[-1], plan.block)
    if why:
        _say_once(f"block-sparse Triton kernel needs {why}; using the reference")
    return not why


def _refusal(device: torch.device, dtype: torch.dtype, dim: int, block: tuple[int, int]) -> str:
    """Why the Triton kernel cannot serve, or nothing."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "compute capability 8.0 or newer, got {}.{}".format(*torch.cuda.get_device_capability(device))
    if dtype not in TRITON_DTYPES:
        return f"float16, bfloat16 or float32, got {dtype}"
    if dim not in HEAD_DIMS:
        return f"a head size of {', '.join(map(str, HEAD_DIMS))}, got {dim}"
    if block[0] % 64 or block[1] % 64:
        return f"blocks that are multiples of 64, got {block}"
    return ""


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _check_plan(q: Tensor, k: Tensor, plan: BlockPlan, scale: float, quantize: Quantize | None) -> None:
    if not scale > 0:
        raise ValueError(f"attend under a plan wants a scale above 0, got {scale}; negate q instead")
    if quantize not in (None, "fp8", "int8"):
        raise ValueError(f"quantize must be None, 'fp8' or 'int8', got {quantize!r}")
    if quantize is not None and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise ValueError("quantize gives no gradients; use torch.no_grad(), or train without it")
    if quantize is not None and plan.permutation is not None and plan.permutation.q_source is not None:
        raise ValueError(
            "quantize takes its scales per block of neighbouring tokens, so it wants tokens that lie in the plan's "
            "order: permute q, k and v first and give the plan without its permutation"
        )
    if plan.indices.device != q.device:
        raise ValueError(f"the plan lies on {plan.indices.device} and q on {q.device}; make the plan on q's device")
    permuted = plan.permutation is not None
    if not (permuted and plan.permutation.q_source is not None):  # type: ignore[union-attr]
        wanted = -(-q.shape[1] // plan.block[0])
        if plan.query_blocks != wanted:
            raise ValueError(
                f"the plan has {plan.query_blocks} query blocks of {plan.block[0]}, but {q.shape[1]} queries make "
                f"{wanted}; make the plan for this length"
            )
    if plan.key_blocks and not permuted and plan.table is None:
        wanted = -(-k.shape[1] // plan.block[1])
        if plan.key_blocks != wanted:
            raise ValueError(
                f"the plan has {plan.key_blocks} key blocks of {plan.block[1]}, but {k.shape[1]} keys make {wanted}; "
                "make the plan for this length"
            )
    for name, size, full in (("rows", plan.indices.shape[0], q.shape[0]), ("heads", plan.indices.shape[1], q.shape[2])):
        if size not in (1, full):
            raise ValueError(f"the plan is for {size} {name}, q has {full}; it must be for 1 or {full}")
