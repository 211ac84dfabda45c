"""The convention every sampler here follows, and the checks they share.

Flow matching (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv 2209.03003): with clean data `x0`, noise
`eps` and a level `sigma` from 0 (clean) to 1 (noise),

    x_sigma = (1 - sigma) x0 + sigma eps        and the network predicts        v = eps - x0.

A level is a number, or a tensor that broadcasts against x, so that every frame or row may stand at its own level.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Sigma: TypeAlias = "float | Tensor"


def check_sigma(sigma: Sigma, x: Tensor, highest: float = 1.0) -> Sigma:
    """`sigma`, ready to be combined with `x`; a tensor of half precision is raised to float32.

    The values of a tensor are not read: that would make the host wait for the device at every step.

    Raises:
        ValueError: a number outside [0, highest], or a tensor whose shape would line up with the wrong axis of x.
    """
    if isinstance(sigma, Tensor):
        fits = sigma.ndim == x.ndim and all(s in (1, n) for s, n in zip(sigma.shape, x.shape, strict=True))
        if not (sigma.ndim == 0 or fits):
            raise ValueError(
                f"sigma of shape {list(sigma.shape)} doesn't line up with x of shape {list(x.shape)}; give it one axis "
                "per axis of x, of size 1 where it is shared: one level per frame of [B, C, F, H, W] is [B, 1, F, 1, 1]"
            )
        return upcast(sigma)
    if not 0 <= sigma <= highest:
        raise ValueError(f"sigma must be between 0 (clean) and {highest:g} (noise), got {sigma}")
    return sigma


def as_level(sigma: Sigma) -> Tensor:
    """`sigma` as a tensor. A number becomes a CPU scalar, which combines with any device without being copied to it."""
    return sigma if isinstance(sigma, Tensor) else torch.tensor(sigma, dtype=torch.float64)


def check_like(name: str, tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` in the precision the updates are computed in; refused if its shape differs from x's."""
    if tensor.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {list(x.shape)}, got {list(tensor.shape)}")
    return upcast(tensor)


def upcast(x: Tensor) -> Tensor:
    """Half precision loses the small differences between neighbouring levels: compute in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def add_noise(x0: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
    """The forward process: (1 - sigma) x0 + sigma noise.

    Args:
        x0: clean data, any shape.
        noise: unit Gaussian noise of the same shape.
        sigma: level in [0, 1]; a number, or a tensor with one axis per axis of x0.

    Raises:
        ValueError: shapes that don't fit, or a number outside [0, 1].
    """
    sigma = check_sigma(sigma, x0)
    return ((1 - sigma) * upcast(x0) + sigma * check_like("noise", noise, x0)).to(x0.dtype)


def clean(x: Tensor, prediction: Tensor, sigma: Sigma) -> Tensor:
    """The data that `prediction` (v) points at from `x` at level sigma: x0 = x - sigma v. Shapes as in `add_noise`."""
    sigma = check_sigma(sigma, x)
    return (upcast(x) - sigma * check_like("prediction", prediction, x)).to(x.dtype)
