"""From a plan to a launch: tile sizes, splits, tensor descriptors, and the operator that compilers and graphs see."""

# A kernel's signature is Triton's, not Python's.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..float8 import FLOAT8
from .backward import backward, keep
from .merge_triton import merge_stacked
from .triton import attend_kernel

MAX_SPLITS = 8
TMA_CAPABILITY = 9
INTERPRETED = 9, 132, 232448  # what a GPU would say: its capability, multiprocessors, bytes of shared memory


@dataclass(frozen=True)
class Config:
    """How one program is cut: `tile_q` queries against `tile_k` keys at a time, by `warps`, `stages` loads ahead.

    `ahead` multiplies the next keys before the softmax of the last scores.
    """

    tile_q: int
    tile_k: int
    warps: int
    stages: int
    max_registers: int | None = None
    ahead: bool = True


def choose_config(block: tuple[int, int], head_dim: int, dtype: torch.dtype, shared_memory: int) -> Config:
    """Measured on an H100; smaller tiles where shared memory is small (consumer Ampere and Ada have 100 KB)."""
    tile_q = 128 if block[0] % 128 == 0 else 64
    if dtype == torch.float32:
        return Config(64, 32, 4, 1)
    small = shared_memory < 160 * 1024
    # Wide tiles of keys rescale the output less often.
    tile_k = 64 if small or block[1] % 128 else 128
    if tile_k == 128 and head_dim == 128:
        if dtype.itemsize == 1:
            return Config(64, 128, 4, 3 if dtype.is_floating_point else 2, ahead=False)
        if tile_q == 128:
            large = shared_memory >= 224 * 1024  # three loads of keys and values beside the queries
            return Config(128, 128, 8, 3, ahead=False) if large else Config(128, 128, 8, 2)
        tile_k = 64
    warps = 8 if tile_q == 128 else 4
    # Small tiles wait less for memory than for one another: two programs per multiprocessor, if both fit.
    return Config(tile_q, tile_k, warps, 2 if small or (tile_q == 64 and head_dim == 128) else 3)


def choose_splits(programs: int, processors: int, width: int) -> int:
    """How many programs share one tile's list when there are few tiles: fewest steps, a little against each split."""
    if programs >= 2 * processors:
        return 1
    limit = max(1, min(MAX_SPLITS, width // 4))
    return min(range(1, limit + 1), key=lambda n: -(-programs * n // processors) / n + 0.05 * n)


@cache
def _properties(index: int):
    return torch.cuda.get_device_properties(index)


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    n_full: Tensor,
    n_masked: Tensor,
    places: Tensor | None,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    bias: Tensor | None,
    q_source: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    at: Tensor | None,
    bits: Tensor | None,
    mean_k: Tensor | None,
    mean_v: Tensor | None,
    log_count: Tensor | None,
    listed: Tensor | None,
    slope: Tensor | None,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
    sinks: int,
    guard: int,
    gathered: bool,
    out_dtype: torch.dtype,
    splits: int = 0,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (out [B, L, H, D] in `out_dtype`, lse float32 [B, H, L]); `splits` 0 chooses.

    With `gathered`, keys were put in order for this call: the padding of a full block is finite, and only hidden.
    In FP8 v is turned, [B, H, D, L], so that its keys lie next to one another; otherwise it is [B, L, H, D]. Numbers of
    8 bits without scales are what they say.
    """
    batch, q_rows, heads, dim = q.shape
    k_rows = k.shape[1]
    quantize = {torch.int8: "int8", FLOAT8: "fp8"}.get(q.dtype, "none")
    v_row = quantize != "fp8"
    capability, processors, shared = _device(q) if q.is_cuda else INTERPRETED
    config = config or choose_config((block_q, block_k), dim, q.dtype, shared)
    n_q, width = indices.shape[2:]
    tiles = n_q * block_q // config.tile_q
    splits = splits or choose_splits(tiles * batch * heads, processors, width)
    # Without a slot a query keeps (0, -inf); where every query has one, nothing needs to be written twice.
    holes = q_lengths is not None or q_source is not None
    shape = (splits, batch, q_rows, heads, dim)
    partial = torch.float32 if splits > 1 else out_dtype
    out = q.new_zeros(shape, dtype=partial) if holes else q.new_empty(shape, dtype=partial)
    lse = q.new_full((splits, batch, heads, q_rows), -torch.inf, dtype=torch.float32)
    descriptors = capability >= TMA_CAPABILITY and q.dtype != torch.float32
    k_desc = v_desc = None
    if descriptors:
        k_desc = _rows_descriptor(k, config.tile_k)
        v_desc = _rows_descriptor(v, config.tile_k) if v_row else _turned_descriptor(v, config.tile_k)
        descriptors = k_desc is not None and v_desc is not None
    # In the kernel v's strides are (row, token, head, channel), whichever way it lies.
    v_sb, v_sl, v_sh, v_sd = v.stride() if v_row else (v.stride(0), v.stride(3), v.stride(1), v.stride(2))
    options = {"maxnreg": config.max_registers} if config.max_registers else {}
    attend_kernel[(tiles, batch * heads, splits)](
        q, k, v, k_desc if descriptors else None, v_desc if descriptors else None, out, lse,
        indices, n_full, n_masked, places, q_lengths, k_lengths, bias, q_source,
        low, high, at, bits, mean_k, mean_v, log_count, listed, slope, q_scale, k_scale, v_scale,
        scale,
        *q.stride()[:3], *k.stride()[:3], v_sb, v_sl, v_sh, v_sd, *out.stride()[:4],
        *_broadcast(indices), *_broadcast(n_full), *_broadcast(places), *_broadcast(q_lengths), *_broadcast(k_lengths),
        *_broadcast(bias), 0 if bias is None or bias.shape[2] == 1 else bias.stride(2),
        *_broadcast(q_source), *_broadcast(low), 0 if low is None else low.stride(2),
        *_broadcast(at), 0 if at is None else at.stride(2), *_broadcast(bits),
        q_rows, k_rows, 0 if mean_k is None else mean_k.shape[2], width, sinks,
        0 if bits is None else bits.shape[-1], heads,
        head_dim=dim, block_q=block_q, block_k=block_k, tile_q=config.tile_q, tile_k=config.tile_k, splits=splits,
        guard=guard, has_box=at is not None, has_bits=bits is not None, axes=0 if at is None else at.shape[2],
        centroid=mean_k is not None, first_order=slope is not None,
        has_table=places is not None, has_q_lengths=q_lengths is not None, has_k_lengths=k_lengths is not None,
        full_lengths=k_lengths is not None and gathered,
        has_bias=bias is not None, has_source=q_source is not None, quantize=quantize, scaled=q_scale is not None,
        v_row=v_row, descriptors=descriptors,
        # Past the end of one row's keys lies the next row, which may be NaN; past the last row descriptors read zeros.
        masked_descriptors=descriptors and (gathered or (k_lengths is None and batch == 1)),
        exact="tf32x3" if q.dtype == torch.float32 else "tf32", stages=config.stages, ahead=config.ahead,
        num_warps=config.warps, num_stages=config.stages, **options,
    )  # fmt: skip
    return (out[0], lse[0]) if splits == 1 else merge_stacked(out, lse, out_dtype)


def _device(q: Tensor) -> tuple[int, int, int]:
    properties = _properties(q.device.index)
    return properties.major, properties.multi_processor_count, properties.shared_memory_per_block_optin


def _broadcast(x: Tensor | None) -> tuple[int, int]:
    """Strides over B and H, 0 where one value serves all."""
    if x is None:
        return 0, 0
    return (0 if x.shape[0] == 1 else x.stride(0)), (0 if x.shape[1] == 1 else x.stride(1))


def _rows_descriptor(x: Tensor, tile: int) -> TensorDescriptor | None:
    """x [B, L, H, D] as a matrix of all tokens by all channels; None where it does not lie like one."""
    batch, rows, heads, dim = x.shape
    row = x.stride(1)
    lies = batch == 1 or x.stride(0) % row == 0
    aligned = x.data_ptr() % 16 == 0 and row * x.element_size() % 16 == 0 and x.stride(2) % 8 == 0 and row > 0
    if not (lies and aligned) or rows == 0:
        return None
    height = rows if batch == 1 else (batch - 1) * (x.stride(0) // row) + rows
    return TensorDescriptor(x, [height, (heads - 1) * x.stride(2) + dim], [row, 1], [tile, dim])


def _turned_descriptor(v: Tensor, tile: int) -> TensorDescriptor:
    """v [B, H, D, L], contiguous, as a matrix of all channels by tokens."""
    batch, heads, dim, rows = v.shape
    return TensorDescriptor(v, [batch * heads * dim, rows], [v.stride(2), 1], [dim, tile])


operator = torch.library.custom_op(
    "millstream::attend_blocks",
    attend_blocks,
    mutates_args=(),
    device_types="cuda",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor n_full, Tensor n_masked, Tensor? places, "
        "Tensor? q_lengths, Tensor? k_lengths, Tensor? bias, Tensor? q_source, Tensor? low, Tensor? high, Tensor? at, "
        "Tensor? bits, Tensor? mean_k, Tensor? mean_v, Tensor? log_count, Tensor? listed, Tensor? slope, "
        "Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, float scale, int block_q, int block_k, int sinks, "
        "int guard, bool gathered, ScalarType out_dtype) -> (Tensor, Tensor)"
    ),
)


@operator.register_fake
def _(q: Tensor, *rest) -> tuple[Tensor, Tensor]:
    out_dtype = rest[-1]
    batch, rows, heads, _ = q.shape
    return q.new_empty(q.shape, dtype=out_dtype), q.new_empty((batch, heads, rows), dtype=torch.float32)


operator.register_autograd(backward, setup_context=keep)
