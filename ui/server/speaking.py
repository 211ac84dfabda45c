"""A speaking model as the server's seats take it: a stream begins silent and is given words while it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ...streaming import Session, SpeechControl
from .sessions import Sessions
from .settings import Settings

if TYPE_CHECKING:
    from ...pipelines.audio import AudioPipeline


class Speaking:
    """Everything of `pipe`, but streams without words at first. Draws no pictures, so their size is empty."""

    size = ()

    def __init__(self, pipe: AudioPipeline) -> None:
        self._pipe = pipe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def stream(self, prompt: str, *, generator: torch.Generator | None = None) -> Session[Any, Any]:
        return Session(self._pipe, SpeechControl(text=prompt, voice=self._pipe.voices[0]), generator=generator)


def speech_sessions(pipe: AudioPipeline, settings: Settings) -> Sessions:
    """Seats of a speaking model beside those of pictures, with the same limits; there is no way back in speech."""
    own = replace(settings, model="speech", recipe="", preset="", history_seconds=0.0, recordings=None)
    speaking: Any = Speaking(pipe)
    return Sessions(speaking, own)
