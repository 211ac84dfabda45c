"""What a caller of a video pipeline gets back, and the session that starts from a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate.hooks import CpuOffload
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..streaming import Session, VideoControl
from .video_state import VideoState

OutputType = Literal["pil", "np", "pt", "latent"]


@dataclass
class VideoPipelineOutput(BaseOutput):
    """`frames`: a list of PIL images, or [T, H, W, 3] (`np`), [T, 3, H, W] (`pt`), [C, F, h, w] (`latent`)."""

    frames: Any


def as_output(pictures: Tensor, output_type: OutputType) -> Any:
    """Pictures [T, 3, H, W] in [0, 1] as `VideoPipelineOutput` says; `latent` is for the caller."""
    if output_type == "pt":
        return pictures
    arrays = pictures.permute(0, 2, 3, 1).cpu().numpy()
    return arrays if output_type == "np" else DiffusionPipeline.numpy_to_pil(np.asarray(arrays))


def as_picture(image: Any, size: tuple[int, int]) -> Tensor:
    """A PIL image, an array [H, W, 3] or a tensor [3, H, W] as a tensor [3, H, W] in [0, 1] of `size`.

    PIL images are turned upright, scaled and cut about their middle; the others must have the right size.

    Raises:
        ValueError: another shape or kind of numbers, or numbers beyond 0 to 1.
    """
    height, width = size
    if hasattr(image, "convert"):
        from PIL import Image, ImageOps

        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):  # grey in 16 bits, of which `convert` would keep the lower 8
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        image = np.asarray(ImageOps.fit(upright.convert("RGB"), (width, height)))
    if isinstance(image, np.ndarray):
        values = torch.from_numpy(np.array(image))
        image = values.movedim(-1, 0) if values.ndim == 3 else values
        image = image.float() / 255 if image.dtype == torch.uint8 else image
    if not isinstance(image, Tensor) or tuple(image.shape) != (3, height, width) or not image.is_floating_point():
        seen = f"{list(image.shape)} in {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"a picture of this pipeline is [3, {height}, {width}] in floats from 0 to 1, got {seen}")
    least, most = image.min().item(), image.max().item()
    if not (least >= 0 and most <= 1):  # so said, not-a-number is refused as well
        raise ValueError(f"a picture of this pipeline is in floats from 0 to 1, got {least:g} to {most:g}")
    return image


class VideoSession(Session[VideoState, VideoControl]):
    """A session that may start from a picture. `step(Frame(picture, time))` redraws an input video as it comes.

    Args:
        image: what the first frame shows, [3, H, W] in [0, 1]; None leaves it to the prompt.
    """

    def __init__(self, *args: Any, image: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.image = image

    def _begun(self) -> VideoState:
        fresh = not self._states
        state = super()._begun()
        if fresh and self.image is not None:
            pipeline: Any = self.pipeline
            pipeline.start_from(state, self.image, self._control)
        return state

    def _twin(self, generator: torch.Generator | None) -> VideoSession:
        return VideoSession(self.pipeline, self._control, generator=generator, image=self.image)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """One tensor of several, without a copy where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def is_offloaded(part: Any) -> bool:
    """Does accelerate move this part between devices at every call?"""
    hooks = [getattr(module, "_hf_hook", None) for module in part.modules()] if isinstance(part, nn.Module) else []
    return any(isinstance(hook, CpuOffload) or getattr(hook, "offload", False) for hook in hooks)
