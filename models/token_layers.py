"""Layers of the token transformer: rotary places on any grid, attention with a cache of fixed memory, feed-forward.

Shapes: B batch, L tokens of a call, H heads of d channels, D = H * d, K keys that are cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import apply_rotary, attend, linear_attend
from ..kernels.fused import gated_silu, norm_rotary
from ..kernels.linear_attention import LinearState
from .modulation import in_one_kernel
from .token_adaptive import AdaptiveBlock
from .token_linear import GatedLinear

Rotary = tuple[Tensor, Tensor]


def axial_angles(places: Tensor, head_dim: int, theta: float = 10000.0) -> Rotary:
    """Cosines and sines of places on a grid of any number of axes: each axis turns an equal share of the channels.

    Args:
        places: [..., A], a coordinate for each of A axes; fractions are fine.
        head_dim: d, a multiple of 2 A.
        theta: base of the frequencies.

    Returns:
        (cos, sin) [..., d // 2], float32.

    Raises:
        ValueError: d is not a multiple of 2 A.
    """
    axes = places.shape[-1]
    if head_dim % (2 * axes):
        raise ValueError(f"head_dim must be a multiple of {2 * axes} to turn along {axes} axes, got {head_dim}")
    per_axis = head_dim // (2 * axes)
    exponents = torch.arange(per_axis, dtype=torch.float64, device=places.device) / per_axis
    angles = (places.double()[..., None] * theta**-exponents).flatten(-2)
    return angles.cos().float(), angles.sin().float()


def grid_places(sides: Sequence[int]) -> Tensor:
    """Coordinates [N, A] of every place of a grid, the last axis fastest: [rows, columns] for a picture."""
    return torch.cartesian_prod(*(torch.arange(side) for side in sides)).reshape(-1, len(sides))


def token_places(grid: Sequence[int], scale_sides: Sequence[int] | None) -> Tensor:
    """Coordinates [N, A] of a grid, or of all scales' cells, each in the middle of what it covers of the last scale."""
    if scale_sides is None:
        return grid_places(grid)
    last = scale_sides[-1]
    return torch.cat([(grid_places((side, side)) + 0.5) * (last / side) - 0.5 for side in scale_sides])


def turns(places: Tensor, head_dim: int, turning: str) -> Rotary:
    """Angles [N, d // 2] of tokens at `places`; for "line" [N + 1, d // 2], the last the prompt's.

    "line" is MaskGIL's published row of places: the first token's cosine and sine are both 0, which mutes it, the
    others stand one place earlier than they are, and the prompt stands last.
    """
    if turning != "line":
        return axial_angles(places, head_dim)
    cos, sin = axial_angles(torch.arange(-1, len(places))[:, None], head_dim)
    cos[0], sin[0] = 0, 0
    return cos, sin


def causal_mask(prefix: int, tokens: int, device: torch.device) -> Tensor:
    """bool [prefix + tokens] squared: the prefix sees itself, a token the prefix and the tokens up to itself."""
    mask = torch.ones(prefix + tokens, prefix + tokens, dtype=torch.bool, device=device).tril()
    mask[:prefix, :prefix] = True
    return mask


class KeysValues:
    """Keys and values of one layer, [B, capacity, H, d]: filled from the front, never moved."""

    def __init__(self, like: Tensor, batch: int, capacity: int, heads: int, head_dim: int) -> None:
        self.k, self.v = (like.new_zeros(batch, capacity, heads, head_dim) for _ in range(2))
        self.length = 0
        self.state: LinearState | None = None  # of a layer that mixes scales

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep [B, L, H, d] of each; returns all that is kept."""
        end = self.length + k.shape[1]
        self.k[:, self.length : end], self.v[:, self.length : end] = k, v
        self.length = end
        return self.kept()

    def kept(self) -> tuple[Tensor, Tensor]:
        return self.k[:, : self.length], self.v[:, : self.length]

    def put(self, index: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Replace the rows `index` [B, L] and return the whole capacity."""
        place = index[..., None, None].expand_as(k)
        self.k.scatter_(1, place, k)
        self.v.scatter_(1, place, v)
        return self.k, self.v


class TokenCache(NamedTuple):
    """What a decoding has computed so far, in memory of fixed size: `begin` makes it, `feed` and its like fill it.

    `layers`: keys and values of every self-attention layer; `shared`: those that the second pass looks at (two_pass);
    `last`: [B, 1, D], what stands at the newest token (causal); `prompt`: [B, S, D], projected.
    """

    layers: list[KeysValues]
    shared: KeysValues | None
    last: Tensor
    prompt: Tensor


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = self.up(x)
        if in_one_kernel(both):
            return self.down(gated_silu(both))
        gate, value = both.chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Heads(nn.Module):
    """Split into heads, normalise each if that is `normed`, turn it to its place."""

    def __init__(self, heads: int, head_dim: int, *, normed: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(head_dim, eps=1e-6) if normed else nn.Identity()

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        if isinstance(self.norm, nn.RMSNorm) and in_one_kernel(x):
            return norm_rotary(x, self.norm.weight, *rotary, heads=self.heads, eps=self.norm.eps or 0.0)
        return apply_rotary(self.split(x), *rotary)

    def split(self, x: Tensor) -> Tensor:
        """Not turned."""
        x = x.unflatten(-1, (self.heads, -1))
        return self.norm(x).to(x.dtype)  # autocast may norm in float32


class Style(NamedTuple):
    """How layers are built, beyond their sizes: see the same arguments of `TokenTransformer`."""

    normed_heads: bool = True
    eps: float = 1e-6
    adaptive: bool = False
    shared: bool = False
    linear_grid: tuple[int, int] | None = None  # sides of the grid, where attention is LINA's


PLAIN = Style()


class Where(NamedTuple):
    """What the attention of a pass sees beyond its own tokens.

    `mask` bool [.., L, K]; `cache`: one per layer, to append to; `index` [B, L]: rows of the cache to replace instead;
    `segments`: lengths of the prompt and the scales that a pass holds, where layers mix them linearly (None: one);
    `told`: what adaptive layers are told.
    """

    rotary: Rotary
    mask: Tensor | None = None
    cache: Sequence[KeysValues] | None = None
    index: Tensor | None = None
    segments: tuple[int, ...] | None = None
    told: Tensor | None = None


class ScaleMixer(nn.Module):
    """Linear attention over scales: tokens see their own scale and all coarser ones through one carried state."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, segments: Sequence[int], state: LinearState | None
    ) -> tuple[Tensor, LinearState | None]:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.to_qkv(self.norm(x)).chunk(3, dim=-1))
        q, k, out = F.elu(q) + 1, F.elu(k) + 1, []
        for part in zip(*(tensor.split(list(segments), dim=1) for tensor in (q, k, v))):
            mixed, state = linear_attend(*part, block=part[0].shape[1], normalize="query", state=state)
            out.append(mixed)
        return self.to_out(torch.cat(out, dim=1).flatten(2)), state


class SelfBlock(nn.Module):
    """Attention among tokens, then feed-forward; normalised before each (RMS), as in LLaMA."""

    def __init__(self, dim: int, heads: int, hidden: int, style: Style = PLAIN, *, mixes: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(dim, eps=style.eps) for _ in range(2))
        self.mixer = ScaleMixer(dim, heads) if mixes else None
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.query, self.key = (Heads(heads, dim // heads, normed=style.normed_heads) for _ in range(2))
        self.linear = None if style.linear_grid is None else GatedLinear(dim, style.linear_grid)
        self.feed_forward = SwiGLU(dim, hidden)

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, L, H, d], turned to their places."""
        q, k, v = self.to_qkv(self.norm1(x)).chunk(3, dim=-1)
        return self.query(q, rotary), self.key(k, rotary), v.unflatten(-1, (self.key.heads, -1))

    def forward(self, x: Tensor, where: Where, layer: int) -> Tensor:
        if self.linear is not None:
            q, k, v = self.to_qkv(self.norm1(x)).chunk(3, dim=-1)
            mixed = self.linear(self.query.split(q), self.key.split(k), v.unflatten(-1, (self.key.heads, -1)))
            x = x + self.to_out(mixed.flatten(2))
            return x + self.feed_forward(self.norm2(x))
        q, k, v = self.project(x, where.rotary)
        if where.cache is not None:
            cache = where.cache[layer]
            k, v = cache.append(k, v) if where.index is None else cache.put(where.index, k, v)
        x = x + self.to_out(attend(q, k, v, mask=where.mask).flatten(2))
        if self.mixer is not None:
            kept = where.cache[layer] if where.cache is not None else None
            mixed, state = self.mixer(x, where.segments or (x.shape[1],), kept.state if kept else None)
            x = x + mixed
            if kept is not None:
                kept.state = state
        return x + self.feed_forward(self.norm2(x))


class CrossBlock(nn.Module):
    """Queries that look at given keys and values and never at each other, then feed-forward."""

    def __init__(self, dim: int, heads: int, hidden: int, style: Style = PLAIN) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(dim, eps=style.eps) for _ in range(2))
        self.to_q, self.to_out = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.query = Heads(heads, dim // heads, normed=style.normed_heads)
        self.feed_forward = SwiGLU(dim, hidden)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        q = self.query(self.to_q(self.norm1(x)), where.rotary)
        x = x + self.to_out(attend(q, k, v, mask=where.mask).flatten(2))
        return x + self.feed_forward(self.norm2(x))


class Stack(nn.Module):
    """Self-attention blocks, or with `cross` blocks that look at keys and values given from outside."""

    def __init__(
        self,
        layers: int,
        dim: int,
        heads: int,
        hidden: int,
        style: Style = PLAIN,
        *,
        cross: bool = False,
        mixes: bool = False,
    ) -> None:
        super().__init__()

        def block() -> nn.Module:
            if style.adaptive:
                return AdaptiveBlock(dim, heads, hidden, shared=style.shared)
            if cross:
                return CrossBlock(dim, heads, hidden, style)
            return SelfBlock(dim, heads, hidden, style, mixes=mixes)

        self.blocks = nn.ModuleList(block() for _ in range(layers))

    def forward(self, x: Tensor, where: Where, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x = block(x, where, layer) if k is None else block(x, k, v, where)
        return x
