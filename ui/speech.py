"""What every command that speaks needs: a loaded speaking model, and how well it kept up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..pipelines.assets import shipped
from .world import model_folder, pick_device

if TYPE_CHECKING:
    from ..pipelines.audio import AudioPipeline
    from ..streaming import Metrics

MODEL = "speech"


def load_speech(name: str, device: str = "auto") -> AudioPipeline:
    """The speaking model `name` (shipped, a folder, or owner/name on the Hugging Face hub) on `device`.

    Raises:
        FileNotFoundError: no such model. ValueError: a device that this machine lacks.
    """
    torch_device = pick_device(device)
    source = model_folder(name, MODEL, "speaking model")

    from ..pipelines.audio import AudioPipeline

    return AudioPipeline.from_pretrained(source).to(torch_device)


def has_speech() -> bool:
    """Does a speaking model ship with this copy?"""
    return shipped(MODEL) is not None


def told(metrics: Metrics) -> str:
    """`first sound 140 ms · 0.21 x real time · 0 underruns`."""
    first, factor = metrics.time_to_first_sound, metrics.real_time_factor
    if first is None or factor is None:
        return "no sound"
    gaps = metrics.underruns
    return f"first sound {1e3 * first:.0f} ms · {factor:.2f} x real time · {gaps} underrun{'' if gaps == 1 else 's'}"
