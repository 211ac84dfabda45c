"""transformers' SEANet layers (Mimi, EnCodec) run on pieces of a clip, with what they keep in one state.

The layers and their weights are transformers' own; only the stepping is here. A convolution sees the last samples of
its input that the piece before left; at the start of a clip it pads as the published model pads (zeros, the first
sample, or a reflection of the first samples, which must then be there). An LSTM keeps its two vectors, a transformer
the keys and values that its window still sees. Classes are told apart by name, since they are two families of copies.
Shapes: R rows, C channels, n samples (frames) of a piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import attend
from .audio_layers import AudioState

Layers = Sequence[Any]


def named_layers(layers: Layers, prefix: str) -> Iterator[tuple[str, str, Any]]:
    """(name, kind, layer) of everything in a stack that has a past; blocks are looked into."""
    for number, layer in enumerate(layers):
        name, kind = f"{prefix}.{number}", _kind(layer)
        if kind == "block":
            yield from named_layers(layer.block, name)
        elif kind != "plain":
            yield name, kind, layer


def _kind(layer: Any) -> str:
    name = type(layer).__name__
    ends = {"Conv1d": "conv", "ConvTranspose1d": "transposed", "ResnetBlock": "block", "LSTM": "lstm"}
    found = [kind for end, kind in ends.items() if name.endswith(end)]
    return found[0] if found else "plain"


def kept(layer: Any) -> int:
    """Samples of its input that a layer needs of the past."""
    conv = layer.conv
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    if isinstance(conv, nn.ConvTranspose1d):
        return -(-kernel // stride) - 1
    return (kernel - 1) * conv.dilation[0] + 1 - stride


def pasts(layers: Layers, prefix: str, rows: int, like: Tensor) -> dict[str, Tensor]:
    """Empty pasts of a stack, of the device and dtype of `like`."""
    made = {}
    for name, kind, layer in named_layers(layers, prefix):
        if kind == "lstm":
            shape = (rows, layer.lstm.num_layers, layer.lstm.hidden_size)
            made |= {f"{name}.{part}": like.new_zeros(shape) for part in ("hidden", "cell")}
        elif kept(layer):
            made[name] = like.new_zeros(rows, layer.conv.in_channels, kept(layer))
    return made


def frames_to_start(layers: Layers, prefix: str, hop: float) -> int:
    """Frames that must be there before a stack can pad its start by reflection as it would pad the whole clip.

    Args:
        hop: of the stack's input, samples per frame (1 for a decoder).
    """
    needed, per_frame = 1, hop
    for _, kind, layer in named_layers(layers, prefix):
        if kind == "conv" and layer.pad_mode == "reflect":
            needed = max(needed, math.ceil((kept(layer) + 1) / per_frame))
        if kind in ("conv", "transposed"):
            stride = layer.conv.stride[0]
            per_frame = per_frame / stride if kind == "conv" else per_frame * stride
    return needed


def run(layers: Layers, prefix: str, x: Tensor, state: AudioState, first: bool) -> Tensor:
    """A stack on the next piece [R, C, n]. Changes `state`. `first`: nothing came before."""
    for number, layer in enumerate(layers):
        name, kind = f"{prefix}.{number}", _kind(layer)
        if kind == "block":
            x = layer.shortcut(x) + run(layer.block, name, x, state, first)
        elif kind == "lstm":
            x = _lstm(layer, name, x, state)
        elif kind == "conv":
            x = convolve(layer, name, x, state, first)
        elif kind == "transposed":
            x = spread(layer, name, x, state)
        else:
            x = layer(x)
    return x


def convolve(layer: Any, name: str, x: Tensor, state: AudioState, first: bool) -> Tensor:
    """A causal convolution."""
    length = kept(layer)
    if length == 0:
        return layer.conv(x)
    past = state.tensors[name]
    given = x if not first else layer._pad1d(x, (length, 0), mode=layer.pad_mode)
    if not first:
        given = torch.cat([past.to(x.dtype), x], dim=-1)
    past.copy_(given[..., -length:])
    return layer.conv(given)


def spread(layer: Any, name: str, x: Tensor, state: AudioState) -> Tensor:
    """A causal transposed convolution: what it makes of the past is cut off again."""
    conv = layer.conv
    length, stride = kept(layer), conv.stride[0]
    past = state.tensors[name]
    given = torch.cat([past.to(x.dtype), x], dim=-1)
    past.copy_(given[..., -length:])
    if conv.groups > 1 or conv.kernel_size[0] != 2 * stride:
        return conv(given)[..., length * stride : given.shape[-1] * stride]
    # As one product: on a CPU, PyTorch's own takes ten times as long for so few samples.
    made = (given.transpose(1, 2) @ conv.weight.flatten(1)).unflatten(2, (-1, 2, stride))
    joined = made[:, 1:, :, 0] + made[:, :-1, :, 1]  # [R, n, C, stride]
    out = joined.transpose(1, 2).flatten(2)
    return out if conv.bias is None else out + conv.bias[:, None]


def _lstm(layer: Any, name: str, x: Tensor, state: AudioState) -> Tensor:
    parts = [state.tensors[f"{name}.{part}"] for part in ("hidden", "cell")]
    given = tuple(part.transpose(0, 1).to(x.dtype).contiguous() for part in parts)
    steps = x.permute(2, 0, 1)
    out, after = layer.lstm(steps, given)
    for part, new in zip(parts, after):
        part.copy_(new.transpose(0, 1))
    return (out + steps).permute(1, 2, 0)


def transformer_pasts(transformer: Any, prefix: str, rows: int, like: Tensor) -> dict[str, Tensor]:
    """Keys and values that a window looks back on, and how many frames came before."""
    config = transformer.config
    shape = (rows, config.sliding_window - 1, config.num_key_value_heads, config.head_dim)
    names = [f"{prefix}.{layer}.{part}" for layer in range(len(transformer.layers)) for part in ("key", "value")]
    position = torch.zeros(rows, dtype=torch.int64, device=like.device)
    return {name: like.new_zeros(shape) for name in names} | {f"{prefix}.position": position}


def run_transformer(transformer: Any, prefix: str, x: Tensor, state: AudioState) -> Tensor:
    """Mimi's transformer on the next frames [R, n, D]. Changes `state`.

    Angles are computed in float64, so that frame 10,000,000 is as exact as frame 10; transformers computes them in
    float32.
    """
    count, window = x.shape[1], transformer.config.sliding_window
    position = state.tensors[f"{prefix}.position"]
    queries = position[:, None] + torch.arange(count, device=x.device)
    keys = position[:, None] + torch.arange(1 - window, count, device=x.device)
    near = (keys[:, None] <= queries[..., None]) & (keys[:, None] > queries[..., None] - window)
    mask = (near & (keys[:, None] >= 0))[:, None]
    angles = queries.double()[..., None] * transformer.rotary_emb.inv_freq.double()
    turn = angles.cos().to(x.dtype)[:, :, None], angles.sin().to(x.dtype)[:, :, None]
    for number, layer in enumerate(transformer.layers):
        seen = _attend(layer.self_attn, layer.input_layernorm(x), turn, mask, state, f"{prefix}.{number}")
        x = x + layer.self_attn_layer_scale(seen)
        x = x + layer.mlp_layer_scale(layer.mlp(layer.post_attention_layernorm(x)))
    position.add_(count)
    return x


def _attend(layer: Any, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, state: AudioState, name: str) -> Tensor:
    q, k, v = (part(x).unflatten(-1, (-1, layer.head_dim)) for part in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = _turned(q, *turn), _turned(k, *turn)
    both = []
    for part, new in (("key", k), ("value", v)):
        past = state.tensors[f"{name}.{part}"]
        full = torch.cat([past.to(new.dtype), new], dim=1)
        past.copy_(full[:, full.shape[1] - past.shape[1] :])
        both.append(full.repeat_interleave(layer.num_key_value_groups, dim=2))
    return layer.o_proj(attend(q, *both, mask=mask, scale=layer.scaling).flatten(2))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Halves of a head's channels turn together, as in LLaMA; x [R, n, H, d], angles [R, n, 1, d / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
