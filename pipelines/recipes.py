"""How published models are run, as data: one table, which anyone may extend.

    mine = replace(RECIPES["longlive"], name="mine", window=15)
    pipe = VideoPipeline.from_pretrained(path, recipe=mine)         # or: add_recipe(mine), and recipe="mine"

A recipe says which noise levels a chunk goes through, how many frames it has, what it sees of the past, and what
becomes of the past when it is full. How that is done is the same for all of them (`video_draw`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Literal

from ..samplers.schedules import warp
from ..streaming.kv_cache import Window

PlanName = Literal["staircase", "triangle", "batch"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to run a causal video model. Frames are latent frames, each of which stands for 4 pictures.

    Args:
        name: what it is called.
        timesteps: the list as published, from 1000 (noise) downwards; the final 0 is implied.
        shift: of the noise table.
        warped: the list is looked up in that table (sigma = shift s / (1 + (shift - 1) s)), or stands as it is.
        chunk: frames drawn together.
        window: frames a chunk sees, itself and the sinks included.
        sinks: first frames that are never forgotten.
        position: sinks stay where they were (`absolute`), or are turned to stand just before the window (`sink`), so
            that distances stay within what the model was trained on, however long the stream.
        overlap: 0 lets the window slide. More: when it is full, memory begins anew from as many last frames, the first
            of them encoded again from its picture, since it then is the first frame of its video.
        plan: `staircase` finishes one chunk after the other; `triangle` has `units` chunks under way at graded levels,
            seen in one pass; `batch` has one chunk per level under way, each level with a memory of its own, and spends
            no pass on clean frames.
        units: chunks under way at once (`triangle`).
        context_timestep: level at which finished frames are remembered.
        motion: how much of the noise fast motion in an input video takes off (`batch`).
        told_less: how far below its true level an input's noise is told to the model (`batch`).
        blend: chunks that `switch="lerp"` takes from one prompt to the next.
        note: what differs from the published code, if anything does.

    Raises:
        ValueError: values that contradict each other.
    """

    name: str
    timesteps: tuple[float, ...]
    shift: float = 5.0
    warped: bool = True
    chunk: int = 3
    window: int = 21
    sinks: int = 0
    position: Literal["absolute", "sink"] = "absolute"
    overlap: int = 0
    plan: PlanName = "staircase"
    units: int = 1
    context_timestep: float = 0.0
    motion: float = 0.0
    told_less: float = 0.0
    blend: int = 4
    note: str = ""

    def __post_init__(self) -> None:
        _check_kinds(self)
        object.__setattr__(self, "timesteps", tuple(map(float, self.timesteps)))
        steps = self.timesteps
        if not steps or not all(0 < t <= 1000 for t in steps) or not all(a > b for a, b in pairwise(steps)):
            raise ValueError(f"timesteps must decrease from at most 1000 and stay above 0, got {list(steps)}")
        if self.plan not in ("staircase", "triangle", "batch"):
            raise ValueError(f"plan must be staircase, triangle or batch, got {self.plan!r}")
        if not 1 <= self.units <= len(steps) or (self.units > 1) != (self.plan == "triangle"):
            raise ValueError(f"a triangle has 2 to {len(steps)} units, other plans 1; got {self.plan}, {self.units}")
        if self.chunk * self.units > self.window - self.sinks:
            raise ValueError(
                f"{self.units} chunks of {self.chunk} frames do not fit a window of {self.window} with "
                f"{self.sinks} sinks"
            )
        if self.overlap and (self.sinks or self.plan != "staircase" or self.overlap > min(self.chunk, self.window / 2)):
            raise ValueError(
                "an overlap needs a staircase without sinks, and is at most a chunk and half a window; got overlap "
                f"{self.overlap}, chunk {self.chunk}, window {self.window}, {self.sinks} sinks, {self.plan}"
            )
        if min(self.chunk, self.blend) < 1 or not 0 <= self.context_timestep < 1000 or not self.shift > 0:
            raise ValueError("chunk and blend must be at least 1, context_timestep in [0, 1000), shift above 0")

    def sigmas(self, strength: float = 1.0) -> list[float]:
        """The levels a chunk goes through, and the final 0.

        `strength` in [0, 1] scales the list before it is looked up, so that less than 1 keeps part of an input (as Krea
        does); at 0 nothing is drawn.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be between 0 (keep the input) and 1 (ignore it), got {strength}")
        if strength == 0:
            return [0.0]
        levels = [strength * t / 1000 for t in self.timesteps]
        return [warp(level, self.shift) if self.warped else level for level in levels] + [0.0]

    @property
    def memory(self) -> Window:
        """Who sees whom."""
        return Window(self.window, self.sinks, self.chunk)

    @property
    def spare(self) -> int:
        """Frames of memory beyond the window: those under way overwrite what the oldest of them still needs."""
        return (self.units - 1) * self.chunk

    @property
    def rows(self) -> int:
        """Rows of memory that one stream takes."""
        return len(self.timesteps) if self.plan == "batch" else 1

    @property
    def passes(self) -> float:
        """Passes of the network per chunk, in a steady stream."""
        return {"staircase": len(self.timesteps) + 1, "triangle": len(self.timesteps) / self.units + 1, "batch": 1}[
            self.plan
        ]


WHOLE = {"chunk": 1, "window": 1, "sinks": 0, "overlap": 0, "units": 1, "blend": 1}  # and the least that each may be
NUMBERS = ("shift", "context_timestep", "motion", "told_less")


def _check_kinds(recipe: Recipe) -> None:
    """ValueError for values of the wrong kind, which a file may hold."""
    steps = recipe.timesteps
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not all(map(_is_number, steps)):
        raise ValueError(f"timesteps must be a list of numbers, got {steps!r}")
    for name, least in WHOLE.items():
        value = getattr(recipe, name)
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number from {least} on, got {value!r}")
    for name in NUMBERS:
        value = getattr(recipe, name)
        if not _is_number(value) or value < 0:
            raise ValueError(f"{name} must be a number from 0 on, got {value!r}")
    for name, kind in (("name", str), ("note", str), ("warped", bool)):
        value = getattr(recipe, name)
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be {'true or false' if kind is bool else 'words'}, got {value!r}")
    if recipe.position not in ("absolute", "sink"):
        raise ValueError(f"position must be absolute or sink, got {recipe.position!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


SELF_FORCING_STEPS = (1000, 750, 500, 250)

RECIPES: dict[str, Recipe] = {}


def add_recipe(recipe: Recipe) -> Recipe:
    """Let `recipe=NAME` find it. ValueError if another one has its name."""
    if RECIPES.get(recipe.name, recipe) != recipe:
        raise ValueError(f"there is a recipe {recipe.name!r} already; give this one another name")
    RECIPES[recipe.name] = recipe
    return recipe


def find_recipe(recipe: Recipe | str | Mapping[str, Any]) -> Recipe:
    """A recipe itself, by name, or from what a saved pipeline wrote.

    Raises:
        ValueError: an unknown name, with those that are known; values that make no recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        known = [field.name for field in fields(Recipe)]
        strange, absent = sorted(recipe.keys() - set(known)), {"name", "timesteps"} - recipe.keys()
        if strange or absent:
            what = f"has no {' and no '.join(sorted(absent))}" if absent else f"holds {', '.join(map(repr, strange))}"
            raise ValueError(f"the recipe {what}; a recipe has {', '.join(known)}")
        return Recipe(**recipe)
    if not isinstance(recipe, str):
        raise ValueError(f"a recipe is given by its name or by its values, got {recipe!r}")
    if recipe not in RECIPES:
        raise ValueError(f"there is no recipe {recipe!r}; there are {', '.join(RECIPES)}, and add_recipe adds more")
    return RECIPES[recipe]


def as_config(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON knows it."""
    return asdict(recipe) | {"timesteps": list(recipe.timesteps)}


for each in (
    # Self-Forcing, Huang et al. 2025 (arXiv 2506.08009)
    Recipe("self_forcing", SELF_FORCING_STEPS),
    # CausVid, Yin et al. 2024 (arXiv 2412.07772): rollouts of 21 frames that share 3
    Recipe("causvid", (1000, 757, 522), shift=8.0, warped=False, overlap=3),
    # LongLive, Yang et al. 2025 (arXiv 2509.22622)
    Recipe("longlive", SELF_FORCING_STEPS, window=12, sinks=3),
    # the same without an end: keys relative to the window
    Recipe("longlive_unbounded", SELF_FORCING_STEPS, window=12, sinks=3, position="sink"),
    # Rolling Forcing, Liu et al. 2025 (arXiv 2509.25161)
    Recipe(
        "rolling_forcing",
        (1000, 800, 600, 400, 200),
        window=21,
        sinks=3,
        position="sink",
        plan="triangle",
        units=5,
        note="the pass that remembers a chunk sees the sinks and 18 frames; the published one sees 21 without sinks",
    ),
    # Krea Realtime 14B: the last 3 frames are computed anew before every chunk
    Recipe("krea", SELF_FORCING_STEPS, window=6, overlap=3),
    # Matrix-Game 2, He et al. 2025 (arXiv 2508.13009)
    Recipe("matrix_game_2", (1000, 666, 333), window=6),
    # StreamDiffusionV2, Feng et al. 2025 (arXiv 2511.07399)
    Recipe(
        "streamdiffusion_v2",
        (700, 500),
        shift=8.0,
        warped=False,
        chunk=1,
        window=6,
        sinks=3,
        position="sink",
        plan="batch",
        motion=0.1,
        told_less=0.1,
        note="sinks are turned at every chunk; the published code refreshes positions at frame 50",
    ),
):
    add_recipe(each)
