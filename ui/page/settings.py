"""What the page needs to know of the server it stands on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class PageSettings:
    """What the page shows, and what it may call. The callables run on worker threads, never on the server's loop.

    Attributes:
        model: what is being served: a shipped name, a folder or a repository.
        models: what the model picker offers; `model` is offered in any case.
        recipe, preset: what `model` was loaded with; empty for the model's own.
        recipes, presets: what else the picker offers.
        pipeline: gives the pipeline that Generate calls; None leaves Generate with a sentence that says so.
        image: gives the pipeline that Image draws with, an `ImagePipeline`; None leaves Image with a sentence.
        speech: does the server speak, so that Sound can be offered?
        load: (model, recipe, preset) -> None swaps what is served, or raises `ValueError`, `OSError` or `ImportError`
            with a sentence for the user. None: the picker shows the command that would serve the model instead.
        clip_seconds: the longest clip that Generate draws.
    """

    model: str = "freedoom"
    models: tuple[str, ...] = ("freedoom",)
    recipe: str = ""
    recipes: tuple[str, ...] = ()
    preset: str = ""
    presets: tuple[str, ...] = ()
    pipeline: Callable[[], Any] | None = None
    image: Callable[[], Any] | None = None
    speech: bool = False
    load: Callable[[str, str, str], None] | None = None
    clip_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is empty; name what is served, for example 'freedoom'")
        if not self.clip_seconds > 0:
            raise ValueError(f"clip_seconds must be more than 0, got {self.clip_seconds}")
        if self.model not in self.models:
            object.__setattr__(self, "models", (self.model, *self.models))
