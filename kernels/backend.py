"""Where a Triton kernel can run. Triton is imported only after this says yes."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def runs_triton(tensor: Tensor, *, what: str = "", capability: tuple[int, int] = (0, 0)) -> bool:
    """Whether an operation on `tensor` may be given to Triton.

    Args:
        what: the operation, for the warning that says, once, why an older GPU runs it in PyTorch.
        capability: the compute capability that it needs of an NVIDIA GPU.
    """
    return tensor.is_cuda and _installed() and _is_new_enough(what, capability, tensor.device)


@cache
def is_hopper(device: torch.device) -> bool:
    """NVIDIA's compute capability 9: an H100, an H200."""
    cuda = device.type == "cuda" and torch.version.hip is None
    return cuda and torch.cuda.get_device_capability(device)[0] == 9


@cache
def _is_new_enough(what: str, capability: tuple[int, int], device: torch.device) -> bool:
    if torch.version.hip is not None or (seen := torch.cuda.get_device_capability(device)) >= capability:
        return True
    needed, got = (f"{major}.{minor}" for major, minor in (capability, seen))
    warnings.warn(f"{what} needs compute capability {needed} or newer, got {got}; using PyTorch", stacklevel=4)
    return False
