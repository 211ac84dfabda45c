"""LINA's attention for tokens on a grid: linear in their number, with a gate for the key and value of every place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import linear_attend

SMALL = 1e-6


class GatedLinear(nn.Module):
    """Everyone sees everyone through one sum: ReLU features, divided by their sum; and a 5 x 5 depthwise convolution of
    the values on the grid, for what is near.

    Source: LINA (arXiv:2601.22630). The gates' exact form is not in the public text; learnt factors that begin at 1 are
    a *surrogate*. Tokens before the grid's, such as a prompt, have no gate and no neighbours.

    Args:
        dim: width of the values, all heads together.
        grid: rows and columns.
    """

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.key_gate, self.value_gate = (nn.Parameter(torch.ones(grid[0] * grid[1])) for _ in range(2))
        self.convolution = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k and v [B, L, H, d], the grid's tokens last; nothing is rotated. Returns the same shape."""
        before = q.shape[1] - self.grid[0] * self.grid[1]
        key_gate, value_gate = (self._padded(gate, before) for gate in (self.key_gate, self.value_gate))
        q, k = (q.relu() + SMALL).to(v.dtype), ((k.relu() + SMALL) * key_gate / q.shape[1]).to(v.dtype)
        out, _ = linear_attend(q, k, (v * value_gate).to(v.dtype), block=q.shape[1], normalize="query")
        picture = v[:, before:].flatten(2).transpose(1, 2).unflatten(2, self.grid)
        near = self.convolution(picture).flatten(2).transpose(1, 2).reshape(v[:, before:].shape)
        return torch.cat([out[:, :before], out[:, before:] + near], dim=1)

    @staticmethod
    def _padded(gate: Tensor, before: int) -> Tensor:
        return torch.cat([gate.new_ones(before), gate])[:, None, None]
