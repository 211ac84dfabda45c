"""Muon for many small matrices: those of one shape are orthogonalised together, as a few batched products."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
ITERATIONS = 5
SMALLEST = 1e-7  # norm of an update


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    The same numbers as `torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")` (arXiv:2502.16982), but a step of a
    small model launches tens of kernels rather than thousands, which would keep a GPU waiting for the host.

    Args:
        params: matrices [R, C], or groups of them.
        lr: their steps have the size that AdamW's would have at this rate.
        weight_decay: decoupled, times the rate.
        momentum: of the running average, which is Nesterov's.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon is for matrices, got a parameter of shape {list(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                self._step(parameters, 0.2 * math.sqrt(max(shape)), group)

    def _step(self, parameters: list[Tensor], scale: float, group: dict[str, Any]) -> None:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        averages = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            averages.append(state["momentum_buffer"])
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, averages, group["momentum"])
        steps = orthogonalised(torch.stack(ahead)).to(parameters[0].dtype).unbind()
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, steps, alpha=-group["lr"] * scale)


def orthogonalised(stack: Tensor) -> Tensor:
    """Matrices [N, R, C] with all singular values brought near 1, in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = stack.shape[1] > stack.shape[2]
    x = stack.bfloat16()
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(SMALLEST)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
