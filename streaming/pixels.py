"""Pictures on their way out: as bytes, and in the host's memory."""

from __future__ import annotations

import torch
from torch import Tensor


def as_bytes(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1], of any shape, as uint8 on the same device."""
    return pictures.detach().float().mul(255).round_().clamp_(0, 255).to(torch.uint8)


def on_host(values: Tensor) -> Tensor:
    """The same numbers, contiguous in the host's memory; what is there already stays.

    From a GPU they go through page-locked memory, which PyTorch keeps for the next call: pages that may move are copied
    at a fraction of the speed.
    """
    values = values.contiguous()
    if not values.is_cuda:
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return host
