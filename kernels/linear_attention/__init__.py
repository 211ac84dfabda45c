"""Linear attention: a state of fixed size in place of keys that pile up, so a stream may remember without end."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..backend import runs_triton
from .reference import FRAME, chunked, recurrent

__all__ = ["LinearState", "Normalize", "linear_attend"]

Normalize = Literal["none", "query", "channel"]
FORGOTTEN = -100.0  # e^-100 is below the last bit of anything it is added to; -inf - -inf would be NaN


class LinearState(NamedTuple):
    """What a stream remembers of its past, of one size however long it is.

    Attributes:
        kv: [B, H, D, E], the decayed sum of k v^T (with `normalize="channel"`: their decayed mean).
        norm: [B, H, D]: with `"query"` the decayed sum of k, with `"channel"` the logarithm of the decayed sum of
            exp(k), -inf before the first token; zeros and unused with `"none"`.
    """

    kv: Tensor
    norm: Tensor


def linear_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 1,
    decay: Tensor | None = None,
    gate: Tensor | None = None,
    normalize: Normalize = "none",
    unrotated: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    state: LinearState | None = None,
) -> tuple[Tensor, LinearState]:
    """Attention without softmax, `out_i = q_i S`, over a state that each block of tokens decays and adds to.

    The tokens of a block see each other whole and everything before: `block=1` is causal by token, a frame's tokens
    give the block-causal attention of video, `block=L` is bidirectional. With n the number of a block,
        S_n = decay exp(gate_n) S_{n-1} + sum over its tokens of k_j v_j^T.
    Calls continue one another: two calls, the second with the first one's state, equal one call over both parts.
    Feature maps (ReLU, SiLU, ...) and scales are the caller's, applied to `q` and `k`.

    With a constant decay this is Lightning Attention (arXiv:2401.04658), with a gate per channel GLA (arXiv:2312.06635)
    and ARFlow's mixing (arXiv:2501.16085), with `normalize="query"` the attention of LINA (arXiv:2601.22630) and
    SANA-Video (arXiv:2509.24695), with `normalize="channel"` LightNet's additive recurrence (arXiv:2405.21022).

    On CUDA and without gradients a Triton kernel runs for blocks of 1, and of 32 tokens or more; else PyTorch. Sums are
    kept in float32 (float64 for float64 inputs).

    Args:
        q: [B, L, H, D], any floating dtype.
        k: shaped like `q`. With `normalize="channel"` these are logits, of any size.
        v: [B, L, H, E].
        block: tokens of a block; L is a multiple of it.
        decay: [H] in (0, 1], what a head keeps from block to block.
        gate: logarithms <= 0, [B, L / block, H] for each head or [B, L / block, H, D] for each channel; -inf forgets.
        normalize: `"none"`; `"query"`: divide by q_i times the decayed sum of k, plus `eps`: a weighted mean of values
            where q and k are not negative; `"channel"`: each key channel is a softmax over the tokens seen so far.
        unrotated: (q, k) before rotary embedding. With `"query"` the divisor is formed from these, since rotated
            features may cancel to zero (SANA-Video).
        state: where an earlier call ended; None for the beginning.

    Returns:
        The output [B, L, H, E] in `v`'s dtype, and the state after the last token. `L` may be 0.

    Raises:
        ValueError: shapes that do not belong together, an unknown `normalize`, or (seen on the CPU only, since a GPU
            value is never read) a decay outside (0, 1] or a positive gate. TypeError: dtypes that differ.
    """
    _check(q, k, v, block, decay, gate, normalize, unrotated, state)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if state is None:
        state = _beginning(q, v, dtype, normalize)
    if q.shape[1] == 0:
        return torch.zeros_like(v), state
    kv, norm = state.kv.to(dtype), state.norm.to(dtype)
    g = _log_decay(q, block, decay, gate, dtype)
    if normalize == "channel":
        k, g, norm = _additive(k, norm, block)
    if normalize == "query":
        above, kv = _run(q, k, v, g, kv, block, dtype)
        q, k = unrotated or (q, k)
        below, total = _run(q, k, v.new_ones(1).expand(*v.shape[:3], 1), g, norm.unsqueeze(-1), block, dtype)
        out, norm = (above / (below + eps)).to(v.dtype), total.squeeze(-1)
    else:
        out, kv = _run(q, k, v, g, kv, block, v.dtype)
    return out, LinearState(kv, norm)


def _run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Out in `dtype` and the state, by the fastest form there is."""
    inputs = (q, k, v, g, state)
    wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    by_operator = q.is_cuda and state.dtype == torch.float32 and (block == 1 or block >= FRAME)
    if by_operator and not wants_gradient:
        return torch.ops.millstream.linear_attention(q, k, v, g, state, block, dtype)
    return _in_pytorch(q, k, v, g, state, block, dtype)


def _in_pytorch(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scores inside chunks where blocks are small; where they are frames the recurrence alone costs less."""
    out, state = (chunked if block < FRAME else recurrent)(q, k, v, g, state, block)
    return out.to(dtype), state


@torch.library.custom_op(
    "millstream::linear_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor state, int block, ScalarType dtype) -> (Tensor, Tensor)",
)
def _operator(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What `torch.compile` and CUDA graphs see."""
    if not runs_triton(q, what="linear attention's Triton kernel", capability=(8, 0)):
        out, state = _in_pytorch(q, k, v, g, state, block, dtype)
        return out.contiguous(), state.contiguous()
    from .triton import linear_attention_triton

    return linear_attention_triton(q, k, v, g, state, block, dtype)


@_operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape, dtype=dtype), state.new_empty(state.shape)


def _beginning(q: Tensor, v: Tensor, dtype: torch.dtype, normalize: Normalize) -> LinearState:
    rows, _, heads, channels = q.shape
    kv = q.new_zeros((rows, heads, channels, v.shape[-1]), dtype=dtype)
    nothing = -torch.inf if normalize == "channel" else 0.0
    return LinearState(kv, q.new_full((rows, heads, channels), nothing, dtype=dtype))


def _log_decay(q: Tensor, block: int, decay: Tensor | None, gate: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Both kinds of decay in one, [B, N, H, 1 or D]."""
    if decay is None and gate is None:
        return None
    blocks = (q.shape[0], q.shape[1] // block, q.shape[2])
    each = None if decay is None else decay.to(q.device, dtype).log()[:, None]
    if gate is None:
        assert each is not None, "one of them was given"
        return each.clamp_min(FORGOTTEN).expand(*blocks, 1)
    g = gate.to(dtype).reshape(*blocks, -1)
    return (g if each is None else g + each).clamp_min(FORGOTTEN)


def _additive(k: Tensor, norm: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """The additive recurrence as a multiplicative one: with Z the running log-sum-exp of the logits k per channel,
    keys exp(k_j - Z_n) and gates Z_{n-1} - Z_n keep a running weighted mean (LightNet, section 3)."""
    logits = k.to(norm.dtype).unflatten(1, (-1, block))
    begun = norm.clamp_min(torch.finfo(norm.dtype).min / 2)  # as good as -inf, and its gradient is a number
    total = torch.cat([begun.unsqueeze(1), logits.logsumexp(2)], dim=1).logcumsumexp(1)
    before, after = total[:, :-1], total[:, 1:]
    keys = (logits - after.unsqueeze(2)).exp().flatten(1, 2)
    return keys.to(k.dtype), (before - after).clamp(FORGOTTEN, 0.0), after[:, -1]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    decay: Tensor | None,
    gate: Tensor | None,
    normalize: str,
    unrotated: tuple[Tensor, Tensor] | None,
    state: LinearState | None,
) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.shape[:3] != q.shape[:3] or v.ndim != 4:
        raise ValueError(
            "linear_attend wants q and k [B, L, H, D] and v [B, L, H, E] of the same B, L and H, "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise TypeError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them")
    rows, length, heads, channels = q.shape
    if block < 1 or length % block:
        raise ValueError(f"the number of tokens must be a multiple of block, got {length} tokens and block={block}")
    if normalize not in ("none", "query", "channel"):
        raise ValueError(f"normalize must be 'none', 'query' or 'channel', got {normalize!r}")
    if decay is not None and decay.shape != (heads,):
        raise ValueError(f"decay must be [H] = [{heads}], one number per head, got {list(decay.shape)}")
    blocks = (rows, length // block, heads)
    if gate is not None and gate.shape not in (blocks, (*blocks, channels)):
        raise ValueError(
            f"gate must be [B, L / block, H] = {list(blocks)} or [B, L / block, H, D] = {[*blocks, channels]}, "
            f"got {list(gate.shape)}"
        )
    if normalize == "channel" and not decay is gate is None:
        raise ValueError("normalize='channel' weighs tokens by its logits alone; leave decay and gate out")
    if unrotated is not None:
        if normalize != "query":
            raise ValueError(f"unrotated shapes the divisor of normalize='query', got normalize={normalize!r}")
        if any(x.shape != q.shape or x.dtype != q.dtype for x in unrotated):
            raise ValueError(f"unrotated must be a pair like q, {list(q.shape)} in {q.dtype}")
    if state is not None:
        expected = [rows, heads, channels, v.shape[-1]]
        if list(state.kv.shape) != expected or list(state.norm.shape) != expected[:3]:
            raise ValueError(
                f"the state must have kv {expected} and norm {expected[:3]}, "
                f"got {list(state.kv.shape)} and {list(state.norm.shape)}"
            )
    for name, value in (("decay", decay), ("gate", gate)):
        if value is not None and value.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_range(name, value.detach())


def _check_range(name: str, value: Tensor) -> None:
    if name == "decay" and not bool(((value > 0) & (value <= 1)).all()):
        raise ValueError(f"decay must lie in (0, 1], got values from {value.min():g} to {value.max():g}")
    if name == "gate" and not bool((value <= 0).all()):
        raise ValueError(f"gate holds logarithms, at most 0 (logsigmoid gives such), got up to {value.max():g}")
