"""A random player: what it presses decides what a world model can learn.

Independent random buttons would jitter on the spot. People hold keys, so this player has habits (long walks, turning
sweeps, circling, bursts of fire, walking backwards, standing still) and keeps each for a random time; a small share of
arbitrary combinations makes sure that no combination of keys is new to the model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BUTTONS = ("MOVE_FORWARD", "MOVE_BACKWARD", "MOVE_LEFT", "MOVE_RIGHT", "TURN_LEFT", "TURN_RIGHT", "ATTACK")
"""The seven buttons of every ViZDoom world, in the order of the columns of `actions`."""


def wander(frames: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Actions uint8 [frames, 7] of a random player: one habit after another, each for a random time."""
    actions = np.zeros((frames, len(BUTTONS)), np.uint8)
    at = 0
    while at < frames:
        buttons, steps = _habit(rng)
        actions[at : at + steps] = buttons
        at += steps
    return actions


def _habit(rng: np.random.Generator) -> tuple[list[int], int]:
    """Held buttons and for how many frames. Probabilities were chosen by looking at the frames they lead to."""
    forward, backward, left, right, turn_left, turn_right, attack = range(len(BUTTONS))
    held = [0] * len(BUTTONS)
    turn = turn_left if rng.random() < 0.5 else turn_right
    strafe = left if rng.random() < 0.5 else right
    kind = rng.random()
    if kind < 0.45:  # a mixture of everything, for a short while
        held[forward] = rng.random() < 0.6
        held[backward] = not held[forward] and rng.random() < 0.2
        held[strafe] = rng.random() < 0.25
        held[turn] = rng.random() < 0.6
        held[attack] = rng.random() < 0.2
        steps = rng.geometric(0.12)
    elif kind < 0.6:  # a long straight walk, often followed by a turn
        held[forward], held[strafe] = 1, rng.random() < 0.15
        steps = rng.integers(12, 48)
    elif kind < 0.75:  # a turning sweep, sometimes firing
        held[turn], held[forward], held[attack] = 1, rng.random() < 0.3, rng.random() < 0.3
        steps = rng.integers(6, 36)
    elif kind < 0.83:  # circling sideways around something in the middle of the view
        held[strafe], held[turn_right if strafe == left else turn_left] = 1, rng.random() < 0.6
        held[attack] = rng.random() < 0.4
        steps = rng.integers(8, 30)
    elif kind < 0.91:  # a burst of fire, standing or moving
        held[attack], held[turn], held[forward] = 1, rng.random() < 0.3, rng.random() < 0.2
        steps = rng.integers(4, 24)
    elif kind < 0.95:  # walking backwards
        held[backward], held[turn], held[attack] = 1, rng.random() < 0.3, rng.random() < 0.3
        steps = rng.integers(6, 24)
    elif kind < 0.975:  # any combination at all, opposite keys included
        held = [int(rng.random() < 0.35) for _ in held]
        steps = rng.integers(3, 12)
    else:  # standing still
        steps = rng.integers(6, 20)
    return [int(button) for button in held], int(steps)
