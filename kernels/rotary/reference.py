"""Rotary embedding in plain PyTorch: one complex product per call."""

from __future__ import annotations

import torch
from torch import Tensor


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels that turn with (time, height, width), as Wan divides a head."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def axis_angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """float64 [..., dim // 2]: position times theta^(-2i / dim)."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / max(dim, 1)
    return positions.double().unsqueeze(-1) * theta**-exponents


def rotary_angles_reference(
    frames: Tensor, height: int, width: int, head_dim: int, theta: float
) -> tuple[Tensor, Tensor]:
    """(cos, sin), float32 [..., F * height * width, head_dim // 2]."""
    time_dim, height_dim, width_dim = axis_dims(head_dim)
    rows = torch.arange(height, device=frames.device)
    columns = torch.arange(width, device=frames.device)
    grid = (*frames.shape, height, width, -1)
    axes = (
        axis_angles(frames, time_dim, theta)[..., None, None, :],
        axis_angles(rows, height_dim, theta)[:, None, :],
        axis_angles(columns, width_dim, theta),
    )
    # cos and sin are taken per axis, before the axes are spread over the grid: F + height + width rows, not F * h * w.
    cos = torch.cat([axis.cos().float().expand(grid) for axis in axes], dim=-1)
    sin = torch.cat([axis.sin().float().expand(grid) for axis in axes], dim=-1)
    return cos.flatten(-4, -2), sin.flatten(-4, -2)


def shift_angles_reference(delta: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), float32 [B, 1, head_dim // 2], that turn the temporal channels by `delta` [B] frames."""
    time_dim, *_ = axis_dims(head_dim)
    angles = axis_angles(delta.unsqueeze(-1), time_dim, theta)
    angles = torch.nn.functional.pad(angles, (0, (head_dim - time_dim) // 2))
    return angles.cos().float(), angles.sin().float()


def apply_rotary_reference(x_BLHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x0 + i x1) * (cos + i sin) for each neighbouring pair of channels, in float32 or float64."""
    dtype = torch.promote_types(x_BLHD.dtype, torch.float32)
    x = x_BLHD.to(dtype)
    if torch.compiler.is_compiling():  # which fuses real arithmetic, but not complex
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x_BLHD.dtype)
    if x.stride(-1) != 1 or x.storage_offset() % 2 or any(stride % 2 for stride in x.stride()[:-1]):
        x = x.clone(memory_format=torch.contiguous_format)  # a complex view must begin on even places
    turn = torch.complex(cos.to(dtype), sin.to(dtype)).unsqueeze(-2)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x_BLHD.dtype)
