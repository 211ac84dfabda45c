"""The same in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-12  # length below which channels count as none


def norm_silu_reference(
    x: Tensor, gamma: Tensor, out: Tensor, kept: Tensor | None = None, more: Tensor | None = None
) -> None:
    if more is not None:
        x = more.add_(x)
    held = 0 if kept is None else kept.shape[2]
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(SMALLEST)
    scale = gamma.reshape(-1, 1, 1, 1) * x.shape[1] ** 0.5
    torch.ops.aten.silu.out((x / length).mul_(scale).to(out.dtype), out=out[:, :, held:])
    if kept is not None:
        out[:, :, :held].copy_(kept)
        kept.copy_(out[:, :, -held:])
