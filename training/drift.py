"""Two thousand frames later: is it still the same world, in the colours the true game has under the same keys?

The true game is played several times with other seeds; how far its own runs lie apart is the unit. Episodes of the true
game end and begin anew, the model's never do.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..pipelines.world import WorldPipeline
from .behaviour import BUTTONS, wander
from .environments import play
from .measures import clipped, colour_histogram, colourfulness, contrast, histogram_distance, images, sharpness
from .prompts import world_named
from .rollout import CONTEXT, draw, keys_of
from .scores import worlds_alike

RUNS = 4
"""True games per world: six pairs, because one pair may by chance walk the same way, or quite another."""
SCRIPTS = ("random", "held")


def script(kind: str, frames: int, seed: int) -> np.ndarray:
    """Actions uint8 [frames, 7]: those of the random player, or walking in a circle with two keys held throughout."""
    if kind == "random":
        return wander(frames, np.random.default_rng(seed))
    actions = np.zeros((frames, len(BUTTONS)), np.uint8)
    actions[:, [BUTTONS.index("MOVE_FORWARD"), BUTTONS.index("TURN_LEFT")]] = 1
    return actions


def drift_score(
    pipe: WorldPipeline, worlds: Sequence[str], kind: str, *, frames: int, steps: int | None, seed: int
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Play all `worlds` for `frames` frames, the model and the true game under the same keys.

    Compared is the second half. `drift` is the mean distance of the model's colour histogram to those of the true runs,
    over the mean distance between two true runs; distances are total variation over 8 x 8 x 8 colours.

    Returns:
        The scores; and for a look, the last true frames (of the first run) and the last drawn ones, uint8
        [worlds, H, W, 3].
    """
    actions = script(kind, CONTEXT + frames, seed)
    actions[0] = 0  # no action led to the first frame
    half = frames // 2
    true: dict[str, list[Tensor]] = {name: [] for name in worlds}
    context = []
    for name in tqdm(worlds, desc=f"true games, {kind} keys", unit="world"):
        for run in range(RUNS):
            played = torch.from_numpy(play(name, actions, seed + run, size=pipe.size))
            if run == 0:
                context.append(played[:CONTEXT])
            true[name].append(played[-half:])
    drawn: list[Tensor] = []
    pressed = torch.from_numpy(actions).expand(len(worlds), -1, -1)
    prompts = [world_named(name).caption for name in worlds]
    for number, pictures in enumerate(
        draw(
            pipe,
            prompts,
            torch.stack(context),
            pressed,
            keys_of(pipe, BUTTONS),
            steps=steps,
            seed=seed,
            title=f"{frames} frames, {kind} keys",
        )
    ):
        if number >= frames - half:
            drawn.append(pictures)
    mine = dict(zip(worlds, torch.stack(drawn, dim=1)))
    scores = {name: _world_score(mine[name], true[name]) for name in worlds}
    summary = {
        "frames": frames,
        "compared": half,
        "true_runs": RUNS,
        "drift": worlds_alike({name: score["drift"] for name, score in scores.items()}),
        "worst": max(scores, key=lambda name: scores[name]["drift"]),
        "by_world": scores,
    }
    return (
        summary,
        torch.stack([true[name][0][-1] for name in worlds]),
        torch.stack([mine[name][-1] for name in worlds]),
    )


def _world_score(mine: Tensor, runs: Sequence[Tensor]) -> dict[str, float]:
    """One world's second half [T, H, W, 3] against that of the true runs."""
    histogram, histograms = _histogram(mine), [_histogram(run) for run in runs]
    to_true = float(np.mean([histogram_distance(histogram, other) for other in histograms]))
    apart = float(np.mean([histogram_distance(a, b) for a, b in combinations(histograms, 2)]))
    score = {"drift": to_true / max(apart, 1e-6), "distance": to_true, "true_distance": apart}
    for measure in (clipped, contrast, colourfulness, sharpness):
        score[measure.__name__] = _mean(measure, mine)
        score[f"true_{measure.__name__}"] = float(np.mean([_mean(measure, run) for run in runs]))
    return {name: round(value, 4) for name, value in score.items()}


def _histogram(frames: Tensor) -> Tensor:
    """Of every fourth frame: neighbours are alike."""
    return colour_histogram(images(frames[::4]))


def _mean(measure: Any, frames: Tensor) -> float:
    return float(measure(images(frames[::4])).mean())
