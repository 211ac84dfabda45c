"""One block of the causal transformer: attention to the stream, attention to the prompt, feed-forward.

Shapes: B batch, L tokens, D model width, H heads of d channels, G groups of L / G neighbouring tokens that share a
timestep (1, the frames or the tokens).

Where a gradient is wanted the operations are Wan's, one by one. A stream is drawn through fewer of them: on a GPU by
`kernels.fused`; on a CPU, where a small operation costs as much to start as to do, by what PyTorch does in one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from ..kernels import BlockPlan, apply_rotary, attend
from ..kernels.float8 import FLOAT8, to_float8
from ..kernels.fused import Quantized, Rows, norm_rotary, quantized_linear
from ..streaming.kv_cache import KVChunk
from .actions import ActionModule, Inputs
from .modulation import gated, in_one_kernel, joined, modulated
from .quantized import QuantizedLinear, is_plain, side_by_side

if TYPE_CHECKING:
    from .mixers import LinearMixer

EMPTY = torch.empty(0)
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Context(NamedTuple):
    """What every block of one pass shares: `grid` frames, rows and columns of tokens, and how many neighbouring tokens
    see each other whole where tokens are mixed linearly. `turn` is `rotary` as complex numbers [B, L, 1, d / 2], where
    a stream has them ready. `plan` makes a layer's attention plan, as `attention_plans.PlannedMixin.planner` says.
    What action modules hear are `inputs`, at the frames' `positions` int64 [B or 1, F]; `frame_mask` bool [1, 1, F, F]
    says which frames see each other where there is no cache."""

    rotary: tuple[Tensor, Tensor]
    mask: Tensor | BlockMask | None
    cache: KVChunk | None
    grid: tuple[int, int, int]
    block: int
    turn: Tensor | None = None
    plan: Callable[..., BlockPlan | None] | None = None
    inputs: Inputs | None = None
    positions: Tensor = EMPTY
    frame_mask: Tensor | None = None


class Fused(NamedTuple):
    """Weights of q, k and v in one piece of memory: [3 D, D], [3 D]; and those of the norms of q and k, [2, D]."""

    weight: Tensor | Quantized
    bias: Tensor
    norm: Tensor


class Attention(nn.Module):
    """Projections and q/k norms of one attention layer; RMSNorm runs over all heads together, as in Wan."""

    def __init__(self, dim: int, heads: int, eps: float, added_kv_proj_dim: int | None = None) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=eps) for _ in range(2))
        if added_kv_proj_dim is not None:
            self.add_k_proj, self.add_v_proj = (nn.Linear(added_kv_proj_dim, dim) for _ in range(2))
            self.norm_added_k = nn.RMSNorm(dim, eps=eps)
        self._fused: Fused | None = None
        self._places: list[tuple[nn.Linear, int]] = []

    def query(self, x: Rows) -> Tensor:
        return self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm_k(self.to_k(x)).unflatten(-1, (self.heads, -1)), self.to_v(x).unflatten(-1, (self.heads, -1))

    def image_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = self.norm_added_k(self.add_k_proj(x)).unflatten(-1, (self.heads, -1))
        return k, self.add_v_proj(x).unflatten(-1, (self.heads, -1))

    def out(self, x: Tensor) -> Tensor:
        return self.to_out[0](x.flatten(-2))

    def takes(self) -> torch.dtype | None:
        """What the product that makes q, k and v wants its rows in, if it is one product in 8 bits."""
        weight = self._fused.weight if self._fused is not None and self._is_fused() else None
        return weight.values.dtype if isinstance(weight, Quantized) else None

    def rotated(self, x: Rows, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, L, H, d] of `x`, q and k turned to their positions and in the numbers that the cache wants."""
        dtype = None if context.cache is None else context.cache.attends_in
        q, k, v = self._rotated(x, context.rotary, context.turn, dtype)
        return (to_float8(q), to_float8(k), v) if dtype == FLOAT8 else (q.to(v.dtype), k.to(v.dtype), v)

    def _rotated(
        self, x: Rows, rotary: tuple[Tensor, Tensor], turn: Tensor | None, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(x, Tensor) and not self._is_fused():
            q, (k, v) = self.query(x), self.keys(x)
            return apply_rotary(q, *rotary), apply_rotary(k, *rotary), v
        assert self._fused is not None, "as was just asked"
        weight, bias, _ = self._fused
        rows: Any = x
        qkv = quantized_linear(rows, weight, bias) if isinstance(weight, Quantized) else F.linear(rows, weight, bias)
        dim = qkv.shape[-1] // 3
        v = qkv[..., 2 * dim :].unflatten(-1, (self.heads, -1))
        if in_one_kernel(qkv):
            weights = self._fused.norm.unbind()
            q, k = (
                norm_rotary(part, weight, *rotary, heads=self.heads, eps=self.eps, dtype=dtype)
                for part, weight in zip((qkv[..., :dim], qkv[..., dim : 2 * dim]), weights)
            )
            return q, k, v
        qk = qkv[..., : 2 * dim].unflatten(-1, (2, dim)).to(torch.promote_types(qkv.dtype, torch.float32))
        size = torch.rsqrt(qk.square().mean(-1, keepdim=True).add_(self.eps))
        qk = (qk * (size * self._fused.norm)).view(*qkv.shape[:2], 2 * self.heads, -1)
        if turn is None:
            turned = apply_rotary(qk, *rotary)
        else:
            turned = torch.view_as_real(torch.view_as_complex(qk.unflatten(-1, (-1, 2))) * turn).flatten(-2)
        q, k = turned.to(qkv.dtype).split(self.heads, dim=2)
        return q, k, v

    def fuse(self) -> None:
        """Lay the weights of q, k and v side by side, so that one product makes all three. Names and values stay."""
        linears: Any = (self.to_q, self.to_k, self.to_v)
        narrow = {eight_bits(linear) for linear in linears}
        if len(narrow) > 1 or (None in narrow and not all(map(is_plain, linears))):
            return  # adapters and what other libraries quantised do more than a product
        with torch.no_grad():
            norm = torch.stack([self.norm_q.weight, self.norm_k.weight])
            if isinstance(self.to_q, QuantizedLinear):
                self._fused = Fused(*side_by_side(linears), norm)
            else:
                weights = inputs_first(torch.cat([linear.weight for linear in linears]))
                self._fused = Fused(weights, torch.cat([linear.bias for linear in linears]), norm)
                for linear, weight, bias in zip(linears, weights.chunk(3), self._fused.bias.chunk(3)):
                    linear.weight.data, linear.bias.data = weight, bias
        self.norm_q.weight.data, self.norm_k.weight.data = norm.unbind()
        self._places = [(linear, linear.weight.data_ptr()) for linear in linears]

    def _is_fused(self) -> bool:
        """Are the weights still those that `fuse` laid out, and does nothing but a product stand between?"""
        if self._fused is None or torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling():  # which cannot see addresses
            return True
        now = self._modules  # for every layer of every pass is asked: not through the slow attributes of modules
        return all(
            now[name] is linear and linear.weight.data_ptr() == place
            for name, (linear, place) in zip(("to_q", "to_k", "to_v"), self._places)
        )


class Block(nn.Module):
    """Self-attention, attention to the prompt, feed-forward; shift, scale and gate come from the timestep."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        heads: int,
        eps: float,
        cross: bool,
        cross_norm: bool,
        added_kv_proj_dim: int | None,
        mixer: LinearMixer | None,
        action_model: ActionModule | None = None,
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm1 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = Attention(dim, heads, eps)
        if cross:
            self.attn2 = Attention(dim, heads, eps, added_kv_proj_dim)
            self.norm2 = FP32LayerNorm(dim, eps, elementwise_affine=True) if cross_norm else nn.Identity()
        self.cross = cross
        self.action_model = action_model
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.norm3 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, six: Six, text: tuple[Tensor, ...], layer: int, context: Context) -> Tensor:
        """`x` [B, L, D]; `six` shifts, scales and gates [B, G, D]; `text` keys as in `TextKeys`."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = six
        y = self.self_attention(self.modulated(x, shift, scale), layer, context)
        if self.cross:
            x, normal = joined(x, y, gate, self.norm2, dtype=eight_bits(self.attn2.to_q))
            y, gate = self.cross_attention(normal, text), None
        if self.action_model is not None:
            x = self.action_model(gated(x, y, gate), layer, context)
            normal = modulated(self.norm3, x, ff_shift, ff_scale, self._hidden_takes())
        else:
            x, normal = joined(x, y, gate, self.norm3, (ff_shift, ff_scale), self._hidden_takes())
        return gated(x, self.feed_forward(normal), ff_gate)

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Rows:
        """What self-attention is given."""
        return modulated(self.norm1, x, shift, scale, None if self.mixer is not None else self.attn1.takes())

    def _hidden_takes(self) -> torch.dtype | None:
        """What the first product of the feed-forward wants its rows in, if both are in 8 bits."""
        net: Any = self.ffn.net
        return eight_bits(net[0].proj) if eight_bits(net[2]) else None

    def feed_forward(self, x: Rows) -> Tensor:
        """`ffn`; the activation is a part of the first product on a GPU, or of the second one's quantisation."""
        net: Any = self.ffn.net
        first, last = net[0].proj, net[2]
        if isinstance(x, Quantized) or eight_bits(last):
            return last.after_gelu(first(x))
        plain = is_plain(first) and is_plain(last) and first.weight.dtype == x.dtype  # which autocast may change
        if in_one_kernel(x) and plain and x.dtype != torch.float32:
            flat = x.reshape(-1, x.shape[-1])
            hidden = torch._addmm_activation(first.bias, flat, first.weight.t(), use_gelu=True)
            return last(hidden).view(x.shape)
        return self.ffn(x)

    def lay_out_weights(self) -> None:
        """Put the weights into the layout that a stream on this device is fastest with; see `inputs_first`."""
        for module in self.modules():
            if is_plain(module):
                module.weight.data = inputs_first(module.weight.data)
        self.attn1.fuse()

    def six(self, modulation: Tensor) -> Six:
        """Shift, scale and gate of both halves, from a timestep's `modulation` [B, G, 6, D]."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (self.scale_shift_table + modulation.float()).unbind(2)
        return shift, scale, gate, ff_shift, ff_scale, ff_gate

    def self_attention(self, x: Rows, layer: int, context: Context) -> Tensor:
        if self.mixer is not None and isinstance(x, Tensor):
            return self.attn1.out(self.mixer(x, self.attn1.query(x), *self.attn1.keys(x), context))
        q, k, v = self.attn1.rotated(x, context)
        if context.cache is not None:
            return self.attn1.out(context.cache.attend(layer, q, k, v, context.plan).to(x.dtype))
        plan = None if context.plan is None else context.plan(layer, q, k, v, context.mask)
        return self.attn1.out(attend(q, k, v, plan, mask=None if plan is not None else context.mask))

    def write_keys(self, x: Tensor, six: Six, layer: int, context: Context) -> None:
        """Write the keys of `x` into the cache and stop there: all that is wanted of the last block of a commit."""
        assert context.cache is not None, "keys are written for a stream"
        rows = self.modulated(x, six[0], six[1])
        if self.mixer is not None and isinstance(rows, Tensor):
            self.mixer(rows, self.attn1.query(rows), *self.attn1.keys(rows), context)
            return
        _, k, v = self.attn1.rotated(rows, context)
        context.cache.attend_view(layer, k, v)

    def cross_attention(self, x: Rows, text: tuple[Tensor, ...]) -> Tensor:
        q = self.attn2.query(x)
        prompts = text[0].shape[0]  # one prompt per stream, or one per frame
        grouped = q.reshape(prompts, -1, *q.shape[2:])
        prompt, *image = (
            attend(grouped, k.to(q.dtype), v.to(q.dtype)) for k, v in zip(text[::2], text[1::2], strict=True)
        )
        out = prompt + image[0] if image else prompt
        return self.attn2.out(out.reshape(q.shape))


def eight_bits(layer: nn.Module) -> torch.dtype | None:
    """What a product in 8 bits wants its rows in; None of any other layer."""
    return layer.dtype if type(layer) is QuantizedLinear else None


def inputs_first(weight: Tensor) -> Tensor:
    """The same weight [out, in], on a CPU stored so that neighbours in memory belong to one input.

    A product with few rows spends most of its time on fetching and packing weights. MKL takes this layout as it is:
    with weights that are not in the cache, 28 layers of four products with 48 rows took 15 ms instead of 23.
    """
    if weight.device.type != "cpu" or weight.stride(0) == 1:
        return weight
    return weight.t().contiguous().t()
