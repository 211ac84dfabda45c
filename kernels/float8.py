"""Numbers in float8_e4m3fn without a scale."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max


def to_float8(x: Tensor) -> Tensor:
    """x as float8_e4m3fn, what lies beyond its ends at 448 instead of NaN; as it is if it is float8."""
    return x if x.dtype == FLOAT8 else x.clamp(-LARGEST, LARGEST).to(FLOAT8)
