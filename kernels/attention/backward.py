"""Gradients through the block-sparse kernel: the transposed plan, the launches, and the operator compilers see."""

# A kernel's signature is Triton's, not Python's.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import torch
from torch import Tensor

from .plan import _listed
from .triton_backward import backward_kernel


def transposed(indices: Tensor, n_full: Tensor, n_masked: Tensor, key_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """The lists of query blocks that visit each key block, (indices, n_full, n_masked) as in a plan."""
    place = torch.arange(indices.shape[-1], device=indices.device)
    shape = (*indices.shape[:-1], key_blocks + 1)

    def visits(first: Tensor, last: Tensor) -> Tensor:
        used = (place >= first[..., None]) & (place < last[..., None])
        target = torch.where(used, indices.long(), key_blocks)
        hits = torch.zeros(shape, dtype=torch.bool, device=indices.device).scatter_(-1, target, True)
        return hits[..., :key_blocks].mT

    full = visits(torch.zeros_like(n_full), n_full)
    return _listed(full, visits(n_full, n_full + n_masked) & ~full, indices.shape[2])


def attend_blocks_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    indices: Tensor,
    n_full: Tensor,
    n_masked: Tensor,
    k_lengths: Tensor | None,
    bias: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    at: Tensor | None,
    bits: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
    sinks: int,
    guard: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v, [B, L, H, D] and contiguous; the rest as in `launch.attend_blocks`."""
    batch, q_rows, heads, dim = q.shape
    k_rows = k.shape[1]
    delta = torch.einsum("blhd,blhd->bhl", d_out.float(), out.float())
    delta = (delta if d_lse is None else delta - d_lse).contiguous()
    # A query that saw nothing: exp(s - huge) is 0, where exp(s - -inf) would be infinite.
    lse = lse.masked_fill(lse == -torch.inf, 1e30).contiguous()
    d_out = d_out.to(q.dtype)
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    turned = transposed(indices, n_full, n_masked, -(-k_rows // block_k))
    wide = 32 if q.dtype == torch.float32 else 64

    def strides(x: Tensor | None, *dims: int) -> tuple[int, ...]:
        return tuple(0 if x is None or x.shape[d] == 1 else x.stride(d) for d in dims)

    def launch(lists: tuple[Tensor, Tensor, Tensor], first: Tensor, second: Tensor, of_queries: bool) -> None:
        places, count_full, count_masked = (x.contiguous() for x in lists)
        own = 64
        rows = -(-(q_rows if of_queries else k_rows) // own)
        backward_kernel[(rows, batch * heads)](
            q, k, v, d_out, lse, delta, first, second, places, count_full, count_masked,
            *(q if x is None else x for x in (bias, k_lengths, low, high, at, bits)), scale,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3],
            *strides(places, 0, 1), *strides(count_full, 0, 1), *strides(bias, 0, 1, 2), *strides(k_lengths, 0, 1),
            *strides(low, 0, 1), 0 if low is None else low.stride(2), *strides(at, 0, 1),
            0 if at is None else at.stride(2), *strides(bits, 0, 1), sinks, 0 if bits is None else bits.shape[-1],
            q_rows, k_rows, heads, places.shape[-1],
            head_dim=dim, block_q=block_q, block_k=block_k, tile=wide, own=own, of_queries=of_queries,
            has_box=at is not None, has_bits=bits is not None, axes=0 if at is None else at.shape[2], guard=guard,
            has_bias=bias is not None, has_lengths=k_lengths is not None,
            exact="tf32x3" if q.dtype == torch.float32 else "tf32", num_warps=4, num_stages=2,
        )  # fmt: skip

    launch((indices, n_full, n_masked), d_q, d_q, True)
    launch(turned, d_k, d_v, False)
    return d_q, d_k, d_v


operator = torch.library.custom_op(
    "millstream::attend_blocks_backward",
    attend_blocks_backward,
    mutates_args=(),
    device_types="cuda",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor d_out, Tensor? d_lse, Tensor indices, "
        "Tensor n_full, Tensor n_masked, Tensor? k_lengths, Tensor? bias, Tensor? low, Tensor? high, Tensor? at, "
        "Tensor? bits, float scale, int block_q, int block_k, int sinks, int guard) -> (Tensor, Tensor, Tensor)"
    ),
)


@operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """What the backward pass needs of a call of `launch.operator`, whose arguments `inputs` are."""
    q, k, v, indices, n_full, n_masked, _, _, k_lengths, bias, _, low, high, at, bits, *rest = inputs
    ctx.numbers = rest[-7:-2]  # scale, block_q, block_k, sinks, guard
    ctx.given = len(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, indices, n_full, n_masked, k_lengths, bias, low, high, at, bits)


def backward(ctx, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *plan = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    return (*operator(q, k, v, out, lse, d_out, d_lse, *plan, *ctx.numbers), *[None] * (ctx.given - 3))
