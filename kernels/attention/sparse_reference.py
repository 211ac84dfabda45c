"""Attention over a block plan in plain PyTorch: the truth the Triton kernel is held to, differentiable, any device.

All query blocks take their w-th listed key block together, so extra memory is that of one block per query block,
however many keys there are. Computed in float32, or in float64 where the inputs are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import BlockPlan, KVSummary

CENTROIDS = 256  # centroids per step


def attend_plan_reference(
    q_BLHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    plan: BlockPlan,
    summary: KVSummary | None,
    scale: float,
    *,
    round_p: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns (out [B, L, H, D] in q's dtype, lse float32 [B, H, L]); keys and values are in slot order already.

    `round_p` rounds the weights to 8 bits before they meet the values, as the FP8 kernel does.
    """
    dtype = torch.promote_types(q_BLHD.dtype, torch.float32)
    block_q, block_k = plan.block
    batch, n_q = q_BLHD.shape[0], plan.query_blocks
    heads = q_BLHD.shape[2]
    q, q_valid = _query_slots(q_BLHD, plan)
    q = q.to(dtype).unflatten(2, (n_q, block_q)) * scale  # [B, H, NQ, block_q, D]
    k, v = (_padded(x.transpose(1, 2), block_k).unflatten(2, (-1, block_k)) for x in (k_BLHD, v_BLHD))
    state = _State(q, round_p)

    indices = plan.indices.expand(batch, heads, -1, -1)
    n_full = plan.n_full.expand(batch, heads, -1)
    n_listed = n_full + plan.n_masked
    rows = torch.arange(batch, device=q.device)[:, None, None]
    columns = torch.arange(heads, device=q.device)[None, :, None]
    widest = indices.shape[-1] if q.is_cuda else int(n_listed.max()) if n_listed.numel() else 0
    bias = _bias(plan)
    for w in range(widest):
        block = indices[..., w].long()
        place = block if plan.table is None else plan.table.long()[rows.clamp_max(plan.table.shape[0] - 1), block]
        scores = q @ k[rows, columns, place].to(dtype).mT
        hidden = _past_the_end(plan, block, place, k_BLHD.shape[1]) | (w >= n_listed)[..., None, None]
        if plan.mask is not None:
            hidden = hidden | (~plan.mask.visible(block, plan.block) & (w >= n_full)[..., None, None])
        scores = scores.masked_fill(hidden, -torch.inf)
        if bias is not None:
            scores = scores + bias.expand(batch, heads, n_q, -1).gather(-1, block[..., None])[..., None]
        values = v[rows, columns, place].to(dtype)
        values = values.masked_fill(hidden.all(-2).unsqueeze(-1), 0.0)  # what nobody sees may be NaN
        state.add(scores, values)
    if plan.rest == "centroid":
        assert summary is not None
        _add_centroids(state, plan, summary, bias, scale)
    out, lse = state.result()
    return _token_order(out.flatten(2, 3), lse.flatten(2), q_valid, q_BLHD, plan)


class _State:
    """Online softmax for q [B, H, NQ, block_q, D]."""

    def __init__(self, q: Tensor, round_p: bool) -> None:
        self.q, self.round_p = q, round_p
        self.highest = q.new_full(q.shape[:-1], -torch.inf)
        self.total, self.rest = q.new_zeros(q.shape[:-1]), q.new_zeros(q.shape[:-1])
        self.out = torch.zeros_like(q)

    def add(self, scores: Tensor, values: Tensor, *, rest: bool = False) -> None:
        # Only what shifts the exponents: the result does not depend on it, so neither do gradients.
        before, self.highest = self.highest, torch.maximum(self.highest, scores.detach().amax(-1))
        # Nothing seen yet: highest is -inf, and -inf - -inf would be NaN, so it is shifted by 0 instead.
        shift = self.highest.masked_fill(self.highest == -torch.inf, 0.0)
        weights, decay = (scores - shift.unsqueeze(-1)).exp(), (before - shift).exp()
        self.total = self.total * decay + weights.sum(-1)
        self.rest = self.rest * decay + (weights.sum(-1) if rest else 0.0)
        if self.round_p:
            weights = (weights * 256).to(torch.float8_e4m3fn).to(weights.dtype) / 256
        self.out = self.out * decay.unsqueeze(-1) + weights @ values

    def result(self) -> tuple[Tensor, Tensor]:
        total = self.total.masked_fill(self.total == 0.0, 1.0)
        lse = (self.highest + total.log()).masked_fill(self.total == 0.0, -torch.inf)
        return self.out / total.unsqueeze(-1), lse


def _query_slots(q_BLHD: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """Queries in slot order [B, H, NQ * block_q, D], and the slots that hold one, bool [B or 1, H or 1, slots]."""
    block, slots = plan.block[0], plan.query_blocks * plan.block[0]
    q = q_BLHD.transpose(1, 2)
    place = torch.arange(slots, device=q.device)
    if plan.permutation is None or plan.permutation.q_source is None:
        valid = (place < q.shape[2])[None, None]
        q = _padded(q, slots)
    else:
        source = plan.permutation.q_source
        valid = source >= 0
        choice = source.clamp_min(0).long()[..., None].expand(*q.shape[:2], -1, q.shape[-1])
        q = q.gather(2, choice).masked_fill(~valid[..., None], 0.0)
    if plan.lengths is not None:
        valid = valid & (place % block < plan.lengths[0].repeat_interleave(block, -1))
    return q, valid


def _token_order(out: Tensor, lse: Tensor, valid: Tensor, q_BLHD: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """Slots back to tokens; a token that stands in no slot gets 0 and -inf."""
    batch, tokens, heads, dim = q_BLHD.shape
    valid = valid.expand(batch, heads, -1)
    if plan.permutation is None or plan.permutation.q_source is None:
        source = torch.arange(out.shape[2], device=out.device).expand(valid.shape)
    else:
        source = plan.permutation.q_source.long().expand(valid.shape)
    target = torch.where(valid, source, tokens)
    placed = out.new_zeros((batch, heads, tokens + 1, dim))
    placed = placed.scatter(2, target[..., None].expand(-1, -1, -1, dim), out)[:, :, :tokens]
    lses = lse.new_full((batch, heads, tokens + 1), -torch.inf).scatter(2, target, lse)[..., :tokens]
    return placed.transpose(1, 2).to(q_BLHD.dtype), lses.float()


def _past_the_end(plan: BlockPlan, block: Tensor, place: Tensor, keys: int) -> Tensor:
    """Bool [B, H, NQ, 1, block_k]: keys past their block's length or past all keys."""
    inside = torch.arange(plan.block[1], device=block.device)
    known = place[..., None] * plan.block[1] + inside < keys
    if plan.lengths is not None:
        lengths = plan.lengths[1].expand(*block.shape[:2], -1).gather(-1, block)
        known = known & (inside < lengths[..., None])
    return ~known.unsqueeze(-2)


def _add_centroids(state: _State, plan: BlockPlan, summary: KVSummary, bias: Tensor | None, scale: float) -> None:
    dtype = state.q.dtype
    listed = plan.listed(summary.key.shape[2])[:, :, :, None]
    weight = summary.count.to(dtype).log()[:, :, None, None]  # log 0 = -inf: an empty block takes no part
    if bias is not None:
        weight = weight + bias[..., None, :]
    for start in range(0, summary.key.shape[2], CENTROIDS):
        part = slice(start, start + CENTROIDS)
        scores = state.q @ summary.key[:, :, None, part].to(dtype).mT + weight[..., part]
        state.add(
            scores.masked_fill(listed[..., part], -torch.inf), summary.value[:, :, None, part].to(dtype), rest=True
        )
    if summary.slope is not None:  # q is scaled already
        state.out = state.out + state.rest[..., None] * (state.q @ summary.slope[:, :, None].to(dtype))


def _bias(plan: BlockPlan) -> Tensor | None:
    """[B or 1, H or 1, NQ or 1, NK]."""
    return plan.bias if plan.bias is None or plan.bias.ndim == 4 else plan.bias[:, :, None]


def _padded(x_BHLD: Tensor, size: int) -> Tensor:
    """Zeros up to a multiple of `size`."""
    missing = -x_BHLD.shape[2] % size
    return torch.nn.functional.pad(x_BHLD, (0, 0, 0, missing)) if missing else x_BHLD
