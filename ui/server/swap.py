"""Another model on a server that runs: loaded beside the one that is served, then served instead of it."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from ..page.memory import memory_plan
from .contract import Servable
from .sessions import Sessions


class Swap:
    """What `PageSettings.load` wants. A model that can't be loaded leaves the one that is served as it is.

    Args:
        sessions: gives those of the server, which is made after the page that calls this.
        load: (model, recipe, preset) -> pipeline.
    """

    def __init__(self, sessions: Callable[[], Sessions], load: Callable[[str, str, str], Servable]) -> None:
        self._sessions, self._load = sessions, load
        self._busy = Lock()

    def __call__(self, model: str, recipe: str, preset: str) -> None:
        """Load it, on this thread, and serve it.

        Raises:
            ValueError: another one is being loaded, it doesn't fit beside the one that is served, or it is damaged.
            OSError: there is no such model.
        """
        if not self._busy.acquire(blocking=False):
            raise ValueError("another model is being loaded; try again in a moment")
        try:
            plan = memory_plan(model, recipe, preset)
            if plan.total > plan.free:
                raise ValueError(f"{model} takes {plan.total >> 20} MB, and {plan.free >> 20} MB are free")
            self._sessions().swap(self._load(model, recipe, preset), model, recipe, preset)
        finally:
            self._busy.release()
