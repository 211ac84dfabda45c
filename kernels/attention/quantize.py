"""8-bit queries, keys and values for attention, one scale per tile (block of a plan) and head.

Keys are smoothed first (SageAttention, arXiv 2410.02367): their mean over the SEQUENCE is subtracted, which moves every
score of a query by the same s q.k_mean; softmax does not see it, and the log-sum-exp gets it back.

INT8: queries and keys are INT8, values keep their type. FP8: queries and keys are e4m3 with a scale per tile; values
are e4m3 with a scale per channel, and lie with their keys next to one another, as Hopper's FP8 tensor cores want them,
the keys of each 16 in `key_order`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..backend import runs_triton
from .turned import GRAIN, turn_values, turned_back

Quantize = Literal["fp8", "int8"]
LARGEST = {"fp8": 448.0, "int8": 127.0}
DTYPE = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
EPSILON = 1e-12  # a block of zeros has scale 0 without it, and 0 / 0 is NaN


class Quantized(NamedTuple):
    """q, k [B, L, H, D] in 8 bits, scales [B, H, blocks]; v in 8 bits [B, H, D, L], scales [B, H, D], or as it was.

    `mean_key` [B, H, D] is what was subtracted from the keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor | None
    mean_key: Tensor


def quantize_attention(q: Tensor, k: Tensor, v: Tensor, block: tuple[int, int], how: Quantize) -> Quantized:
    """Quantise q, k, v [B, L, H, D], tokens in slot order, for a plan of these blocks."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    mean_key = k.mean(1, dtype=torch.float32)
    q8, q_scale = quantize_tiles(q, block[0], how)
    k8, k_scale = quantize_tiles(k, block[1], how, mean_key)
    if how == "int8":
        return Quantized(q8, k8, v, q_scale, k_scale, None, mean_key)
    v8, v_scale = _turned(v)
    return Quantized(q8, k8, v8, q_scale, k_scale, v_scale, mean_key)


def _turned(v: Tensor) -> tuple[Tensor, Tensor]:
    """v [B, L, H, D] as e4m3 [B, H, D, L], and the scale of each channel, float32 [B, H, D]."""
    low, high = v.aminmax(dim=1)
    scale = torch.maximum(high, -low).float() / LARGEST["fp8"] + EPSILON
    batch, tokens, heads, dim = v.shape
    rows = -(-tokens // GRAIN) * GRAIN  # a tensor descriptor's rows start at multiples of 16 bytes
    v8 = torch.empty((batch, heads, dim, rows), dtype=DTYPE["fp8"], device=v.device)
    v8.view(torch.uint8)[..., tokens // GRAIN * GRAIN :] = 0  # past the end
    turn_values(v, v8, scale=scale)
    return v8, scale


def quantize_tiles(x: Tensor, block: int, how: Quantize, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [B, L, H, D] less `mean` [B, H, D], in 8 bits, and each block of tokens' scale, float32 [B, H, blocks]."""
    if runs_triton(x):
        from .quantize_triton import quantize_tiles_triton

        return quantize_tiles_triton(x if x.stride(-1) == 1 else x.contiguous(), block, how, mean)
    return quantize_tiles_reference(x, block, how, mean)


def quantize_tiles_reference(x: Tensor, block: int, how: Quantize, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    tokens = x.shape[1]
    x = x.float() if mean is None else x.float() - mean[:, None]
    tiles = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -tokens % block)).unflatten(1, (-1, block))
    scale = tiles.abs().amax((2, 4)) / LARGEST[how] + EPSILON  # [B, blocks, H]
    tiles = tiles / scale[:, :, None, :, None]
    tiles = tiles.round() if how == "int8" else tiles
    return tiles.to(DTYPE[how]).flatten(1, 2)[:, :tokens], scale.transpose(1, 2).contiguous()


def dequantize(quantized: Quantized, block: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, L, H, D] as the tensor cores see them: what the reference computes with."""
    q, k = (
        x.to(dtype) * scale.to(dtype).repeat_interleave(size, 2)[:, :, : x.shape[1]].transpose(1, 2).unsqueeze(-1)
        for x, scale, size in (
            (quantized.q, quantized.q_scale, block[0]),
            (quantized.k, quantized.k_scale, block[1]),
        )
    )
    v = quantized.v
    if quantized.v_scale is not None:
        v = turned_back(v, k.shape[1]).to(dtype) * quantized.v_scale.to(dtype)[:, None]
    return q, k, v.to(dtype)
