"""Noise that is a pure function of (seed, frame, step, element): batching, replay and forks change nothing.

Philox4x32-10 (Salmon et al., SC 2011) with the 64-bit seed as key and the counter (element // 4, low word of frame,
high word of frame, step). The four words of a counter belong to four neighbouring elements of the flattened
shape, so a shape with more elements begins with the same numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backend import runs_triton
from .reference import philox_normal_reference, philox_uniform_reference

__all__ = ["philox_normal", "philox_uniform"]

# Bits kept by a uniform draw: as many as the type's significand, so that no value is rounded up to 1.
UNIFORM_BITS = {torch.float64: 32, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def philox_normal(
    seed: Tensor, frame: Tensor, step: int, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise for each row, the same on CPU and GPU.

    The random words are equal to the bit on every device. The transform to normals (Box and Muller) is taken in float64
    and rounded to float32, so devices differ at most in the last bit of a rare value (about one in a hundred million).

    Args:
        seed: int64 [R], each in [0, 2^63). Rows do not influence one another.
        frame: int64 [R], the index of the frame that the noise is for.
        step: which draw for this frame, in [0, 2^32); the sampler's step index, usually.
        shape: shape of one row's noise.
        dtype: float64, float32, float16 or bfloat16: the float32 value, converted.

    Returns:
        [R, *shape], on the device of `seed`. The largest magnitude that can occur is 6.7.

    Raises:
        TypeError: `seed` or `frame` is not int64, or an unknown dtype. ValueError: shapes that differ, a step out of
            range, more than 2^34 elements, or (seen on the CPU only, since a GPU value is never read) a negative seed.
    """
    count = _check(seed, frame, step, shape, dtype)
    if runs_triton(seed):
        from .triton import philox_triton

        normal = philox_triton(seed, frame, step, count, bits=None)
    elif seed.device.type == "mps":  # which has no float64
        normal = philox_normal_reference(seed.cpu(), frame.cpu(), step, count).to(seed.device)
    else:
        normal = philox_normal_reference(seed, frame, step, count)
    return normal.to(dtype).reshape(seed.shape[0], *shape)


def philox_uniform(
    seed: Tensor, frame: Tensor, step: int, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform noise in [0, 1) for each row, equal to the bit on CPU and GPU.

    Arguments and errors are those of `philox_normal`. Values are multiples of 2^-32 (float64), 2^-24 (float32), 2^-11
    (float16) or 2^-8 (bfloat16): the leading bits of the same word.

    Returns:
        [R, *shape], on the device of `seed`.
    """
    count = _check(seed, frame, step, shape, dtype)
    bits = UNIFORM_BITS[dtype]
    if runs_triton(seed):
        from .triton import philox_triton

        uniform = philox_triton(seed, frame, step, count, bits=bits)
    elif seed.device.type == "mps":  # which has no float64
        uniform = philox_uniform_reference(seed.cpu(), frame.cpu(), step, count, bits).float().to(seed.device)
    else:
        uniform = philox_uniform_reference(seed, frame, step, count, bits)
    return uniform.to(dtype).reshape(seed.shape[0], *shape)


def _check(seed: Tensor, frame: Tensor, step: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """The number of elements of one row."""
    for name, value in (("seed", seed), ("frame", frame)):
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            seen = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be an int64 tensor [R], got {seen}")
    if seed.ndim != 1 or seed.shape != frame.shape:
        raise ValueError(
            f"seed and frame must both be [R], one value per row, got {list(seed.shape)} and {list(frame.shape)}"
        )
    if seed.device.type == "cpu" and seed.numel() and int(seed.min()) < 0:
        raise ValueError(
            f"a seed must be in [0, 2^63), got {int(seed.min())}; draw it with torch.randint(2**63 - 1, ...)"
        )
    if not 0 <= step < 2**32:
        raise ValueError(f"step must be in [0, 2^32), got {step}")
    if dtype not in UNIFORM_BITS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, UNIFORM_BITS))}, got {dtype}")
    count = math.prod(shape)
    if count > 2**34:
        raise ValueError(f"one row may have 2^34 elements, got {count:,} for shape {tuple(shape)}; draw it in parts")
    return count
