"""What a caller of a world hands in and gets back, in the forms that callers like."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate.hooks import CpuOffload
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .world_state import WorldState

Keys = str | Iterable[str] | None
OutputType = Literal["pil", "np", "pt", "latent"]


@dataclass
class WorldPipelineOutput(BaseOutput):
    """`frames`: a list of PIL images, or [T, H, W, 3] (`np`), [T, 3, H, W] (`pt`), [C, T, h, w] (`latent`)."""

    frames: Any


def pressed(held: Keys) -> frozenset[str]:
    """One entry of a key script as a set."""
    if held is None:
        return frozenset()
    return frozenset([held] if isinstance(held, str) else held)


def last_latents(state: WorldState | None) -> Tensor:
    """[C, h, w] of the frame that a session has just drawn."""
    assert state is not None, "a session that has stepped has a state"
    assert state.latents is not None, "and that state a frame"
    return state.latents


def as_output(frames: Sequence[Tensor], output_type: OutputType) -> Any:
    """Frames [3, H, W] (latents [C, h, w]) as `WorldPipelineOutput` says."""
    if output_type == "latent":
        return torch.stack(list(frames), dim=1)
    clip = torch.stack(list(frames))
    if output_type == "pt":
        return clip
    pictures = clip.permute(0, 2, 3, 1).cpu().numpy()
    return pictures if output_type == "np" else DiffusionPipeline.numpy_to_pil(np.asarray(pictures))


def is_offloaded(part: Any) -> bool:
    """Does accelerate move this part between devices at every call?"""
    hooks = [getattr(module, "_hf_hook", None) for module in part.modules()] if isinstance(part, nn.Module) else []
    return any(isinstance(hook, CpuOffload) or getattr(hook, "offload", False) for hook in hooks)
