"""Factorised space-time attention: within frames, across frames, or both in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..attention import BlockPlan
from .window import window


def spatial(grid: Sequence[int], *, device: torch.device | str = "cpu") -> BlockPlan:
    """Each token sees its own frame of a (frames, height, width) grid."""
    return window(grid, (1, *grid[1:]), tile=_frame_tile(grid), device=device)


def temporal(grid: Sequence[int], *, device: torch.device | str = "cpu") -> BlockPlan:
    """Each token sees its own place in every frame."""
    frames, _, width = grid
    across = max(1, min(width, 64 // frames if frames < 64 else 1))
    return window(grid, (frames, 1, 1), tile=(min(frames, 64), 1, across), device=device)


def interleaved(grid: Sequence[int], layer: int, *, device: torch.device | str = "cpu") -> BlockPlan:
    """Space in even layers, time in odd ones (PredFormer's interleaved blocks, arXiv 2410.04733)."""
    return (temporal if layer % 2 else spatial)(grid, device=device)


def _frame_tile(grid: Sequence[int]) -> tuple[int, int, int]:
    """Rows of one frame, as many as fit 128 tokens."""
    _, height, width = grid
    columns = min(width, 128)
    return 1, max(1, min(height, 128 // columns)), columns
