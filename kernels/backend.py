"""Where a Triton kernel can run. Triton is imported only after this says yes."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def runs_triton(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` may be given to Triton."""
    return tensor.is_cuda and _installed()
