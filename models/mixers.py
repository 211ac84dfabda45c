"""Layers that mix tokens by linear attention, in the place of softmax self-attention.

A mixer stands between a layer's projections, which are those of softmax attention, and its output: a checkpoint's
layer can be turned into a linear one and trained on. Over a stream it carries a state of fixed size in a `HybridCache`.
Shapes: B batch, F frames, T tokens per frame, L = F * T, H heads of d channels, D = H * d.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import apply_rotary, linear_attend
from ..kernels.linear_attention import Normalize
from ..streaming.kv_cache import KVCache
from ..streaming.linear_state import HybridCache, HybridChunk
from .actions import ActionCache

if TYPE_CHECKING:
    from .block import Context
    from .transformer import CausalTransformer3DModel

SMALL = 1e-6


class LinearMixer(nn.Module):
    """Maps queries and keys to features, attends linearly, finishes.

    Args:
        dim, heads: D and H.
        layer, layers: which layer of how many this is.
        tokens: T, where the model knows it.
    """

    normalize: ClassVar[Normalize] = "none"

    def __init__(self, dim: int, heads: int, layer: int, layers: int, tokens: int | None) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """`x` [B, L, D] is what the layer was given; `q`, `k`, `v` and the result are [B, L, H, d], not yet rotated."""
        chunk = context.cache
        if chunk is not None and not isinstance(chunk, HybridChunk):
            raise ValueError("this model has linear layers, which a KVCache cannot serve; use models.mixers.make_cache")
        state = None if chunk is None else chunk.state(self.layer)
        given = self.features(x, q, k, v, context)
        out, state = linear_attend(**given, block=context.block, normalize=self.normalize, state=state)
        if chunk is not None:
            chunk.keep(self.layer, state)
        return self.finish(out, x, v, context)

    def features(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> dict[str, Any]:
        """Arguments of `linear_attend`."""
        raise NotImplementedError

    def finish(self, out: Tensor, x: Tensor, v: Tensor, context: Context) -> Tensor:
        """Unnormalised sums grow with what is remembered: bring them back, head by head."""
        return F.rms_norm(out, out.shape[-1:], eps=SMALL)


class Lina(LinearMixer):
    """LINA (arXiv:2601.22630): ReLU features, division by their sum, a gate for the key and the value of every place of
    a frame, and a depthwise 5 x 5 convolution of the values within each frame.

    The gates' exact form is not in the public text; learnt factors that begin at 1 are a *surrogate*. They need the
    number of places (`position_grid`), as does knowing where a token stands, since nothing is rotated here.
    """

    normalize = "query"

    def __init__(self, dim: int, heads: int, layer: int, layers: int, tokens: int | None) -> None:
        super().__init__(dim, heads, layer, layers, tokens)
        if tokens is None:
            raise ValueError('mixer "lina" has a gate for every place of a frame: give position_grid=(rows, columns)')
        self.key_gate, self.value_gate = (nn.Parameter(torch.ones(tokens)) for _ in range(2))
        self.convolution = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    def features(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> dict[str, Any]:
        frames = context.grid[0]
        key_gate, value_gate = (gate.repeat(frames)[:, None, None] for gate in (self.key_gate, self.value_gate))
        k = (k.relu() + SMALL) * key_gate / context.block
        return {"q": (q.relu() + SMALL).to(v.dtype), "k": k.to(v.dtype), "v": (v * value_gate).to(v.dtype)}

    def finish(self, out: Tensor, x: Tensor, v: Tensor, context: Context) -> Tensor:
        pictures = v.flatten(2).reshape(-1, *context.grid[1:], x.shape[-1]).permute(0, 3, 1, 2)
        return out + self.convolution(pictures).permute(0, 2, 3, 1).reshape(out.shape)


class Sana(LinearMixer):
    """SANA-Video (arXiv:2509.24695): ReLU features, rotated above the line and not below it."""

    normalize = "query"

    def features(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> dict[str, Any]:
        q, k = q.relu().to(v.dtype), (k.relu() / context.block).to(v.dtype)
        return {"q": rotated(q, context), "k": rotated(k, context), "v": v, "unrotated": (q, k)}

    def finish(self, out: Tensor, x: Tensor, v: Tensor, context: Context) -> Tensor:
        return out


class Lightning(LinearMixer):
    """Lightning Attention (arXiv:2401.04658) with TransNormerLLM's decays: heads and layers forget at different rates.

    Decay is counted in blocks of frames, within which tokens see each other whole, where the paper counts tokens.
    """

    def __init__(self, dim: int, heads: int, layer: int, layers: int, tokens: int | None) -> None:
        super().__init__(dim, heads, layer, layers, tokens)
        self.slope = 8 / heads * (1 - layer / layers)

    def features(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> dict[str, Any]:
        q, k = (rotated(F.silu(part), context).to(v.dtype) for part in (q, k))
        # Made anew: a buffer would become bfloat16 with the model, in which a slow decay is none.
        head = torch.arange(1, q.shape[2] + 1, device=q.device, dtype=torch.float32)
        return {"q": q, "k": k, "v": v, "decay": torch.exp(-self.slope * head)}


class Gated(LinearMixer):
    """Gated linear attention (arXiv:2312.06635) with ARFlow's gates, logsigmoid / 16 of the input.

    Two *surrogates*, where the papers gate every channel of every token: one gate serves a block of frames, the mean
    over its tokens, and the two channels that rotary embedding turns together, as decay must commute with rotation.
    """

    def __init__(self, dim: int, heads: int, layer: int, layers: int, tokens: int | None) -> None:
        super().__init__(dim, heads, layer, layers, tokens)
        self.to_decay = nn.Sequential(nn.Linear(dim, 16, bias=False), nn.Linear(16, dim // 2))
        self.to_gate = nn.Linear(dim, dim)
        self.scale = nn.Parameter(torch.ones(dim // heads))

    def features(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> dict[str, Any]:
        gate = F.logsigmoid(self.to_decay(x).float()).unflatten(1, (-1, context.block)).mean(2) / 16
        gate = gate.repeat_interleave(2, dim=-1)
        q, k = (rotated(part, context).to(v.dtype) for part in (q, k))
        return {"q": q * q.shape[-1] ** -0.5, "k": k, "v": v, "gate": gate.unflatten(-1, q.shape[2:])}

    def finish(self, out: Tensor, x: Tensor, v: Tensor, context: Context) -> Tensor:
        normal = F.rms_norm(out, out.shape[-1:], self.scale.to(out.dtype), SMALL)
        return normal * F.silu(self.to_gate(x)).unflatten(-1, out.shape[2:])


class LightNet(LinearMixer):
    """LightNet (arXiv:2405.21022): the additive recurrence; each key channel is a softmax over all tokens so far.

    Nothing is rotated: where a token stands must be in its features (`position_grid`).
    """

    normalize = "channel"

    def features(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> dict[str, Any]:
        return {"q": F.silu(q).to(v.dtype), "k": k.to(v.dtype), "v": v}


KINDS: dict[str, type[LinearMixer]] = {
    "lina": Lina,
    "sana": Sana,
    "lightning": Lightning,
    "gated": Gated,
    "lightnet": LightNet,
}


def rotated(x: Tensor, context: Context) -> Tensor:
    return apply_rotary(x, *context.rotary)


def mixer_kinds(mixer: str | Sequence[str], layers: int) -> list[str]:
    """What mixes tokens in each layer: "softmax" or one of `KINDS`.

    Args:
        mixer: `"softmax"`; `"linear"` or `"linear(KIND)"`, every layer linear (by SANA-Video's kind unless said);
            `"hybrid(KIND)"` or `"hybrid(KIND, every=4)"`, every fourth layer softmax and the others linear; or a
            sequence with "softmax" or a kind for each layer.

    Raises:
        ValueError: something else.
    """
    if not isinstance(mixer, str):
        kinds = list(mixer)
        if len(kinds) != layers or not set(kinds) <= {"softmax", *KINDS}:
            raise ValueError(f"mixer must name softmax or one of {', '.join(KINDS)} for {layers} layers, got {kinds}")
        return kinds
    if mixer == "softmax":
        return ["softmax"] * layers
    parsed = re.fullmatch(r"(linear|hybrid)(?:\(\s*(\w+)\s*(?:,\s*every\s*=\s*(\d+)\s*)?\))?", mixer)
    kind = parsed and (parsed[2] or "sana")
    if parsed is None or kind not in KINDS or (parsed[1] == "linear" and parsed[3]) or parsed[3] in ("0", "1"):
        raise ValueError(
            f"mixer must be 'softmax', 'linear(KIND)' or 'hybrid(KIND, every=N)' with N at least 2 and KIND one of "
            f"{', '.join(KINDS)}, or a sequence with one name per layer; got {mixer!r}"
        )
    every = layers + 1 if parsed[1] == "linear" else int(parsed[3] or 4)
    return ["softmax" if layer % every == every - 1 else kind for layer in range(layers)]


def make_mixers(
    mixer: str | Sequence[str], layers: int, *, dim: int, heads: int, tokens: int | None
) -> list[LinearMixer | None]:
    """A mixer for each linear layer, None for softmax layers; `tokens` per frame where the model knows it."""
    kinds = mixer_kinds(mixer, layers)
    return [
        None if kind == "softmax" else KINDS[kind](dim, heads, layer, layers, tokens)
        for layer, kind in enumerate(kinds)
    ]


def make_cache(transformer: CausalTransformer3DModel, **others: Any) -> KVCache:
    """The cache that a model's layers need: a `HybridCache` if some are linear.

    Args:
        others: `rows`, `tokens_per_frame`, `window` and the rest of `KVCache`'s arguments; device and dtype are the
            model's unless given.
    """
    config = transformer.config
    kinds = mixer_kinds(config["mixer"], config["num_layers"])
    linear: dict[int, Normalize] = {
        layer: KINDS[kind].normalize for layer, kind in enumerate(kinds) if kind != "softmax"
    }
    shape = {
        "layers": config["num_layers"],
        "heads": config["num_attention_heads"],
        "head_dim": config["attention_head_dim"],
        "device": transformer.device,
        "dtype": transformer.dtype,
    }
    if config["action_modules"]:
        if linear:
            raise ValueError("a model hears keys in softmax layers alone: leave out mixer, or action_modules")
        return ActionCache(modules=config["action_modules"], **(shape | others))
    return HybridCache(linear=linear, **(shape | others)) if linear else KVCache(**(shape | others))
