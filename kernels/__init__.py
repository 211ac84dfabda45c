"""Tensor operations and nothing else: a folder each, with a PyTorch reference and, where it pays, a Triton kernel."""

from .attention import BlockPlan, attend, merge
from .linear_attention import linear_attend
from .noise import philox_normal, philox_uniform
from .rotary import apply_rotary, rotary_angles, shift_frames

__all__ = [
    "BlockPlan",
    "apply_rotary",
    "attend",
    "linear_attend",
    "merge",
    "philox_normal",
    "philox_uniform",
    "rotary_angles",
    "shift_frames",
]
