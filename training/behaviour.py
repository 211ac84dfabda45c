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


class Wanderer:
    """Decides what is held at each frame; the same `rng` state and the same walls give the same buttons."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._plan: list[tuple[list[int], int]] = []

    def press(self, *, facing_wall: bool = False) -> list[int]:
        """One 0 or 1 per button. `facing_wall`: a wall right ahead filled the last frame.

        Someone who runs into a wall looks at it for a moment and turns round. That halves the share of frames that show
        nothing but bricks, from about 26 % to 13 % over all worlds.
        """
        turning_round = len(self._plan) == 2
        if facing_wall and not turning_round and self._rng.random() < 0.3:
            self._plan, turning_round = _turn_round(self._rng), True
        if not self._plan:
            self._plan = [_habit(self._rng)]
        held, steps = self._plan[0]
        stay = turning_round and facing_wall and self._rng.random() < 0.9  # turn for as long as it takes
        if not stay:
            self._plan[:1] = [(held, steps - 1)] if steps > 1 else []
        return held


def wander(frames: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Actions uint8 [frames, 7] of a player who sees no walls: keys for games that are compared under equal keys."""
    wanderer = Wanderer(rng)
    return np.array([wanderer.press() for _ in range(frames)], np.uint8)


def _turn_round(rng: np.random.Generator) -> list[tuple[list[int], int]]:
    """Turn until the wall is out of the way and a little further, then walk off."""
    turn, walk = [0] * len(BUTTONS), [0] * len(BUTTONS)
    turn[BUTTONS.index("TURN_LEFT" if rng.random() < 0.5 else "TURN_RIGHT")] = 1
    turn[BUTTONS.index("ATTACK")] = int(rng.random() < 0.1)
    walk[BUTTONS.index("MOVE_FORWARD")] = 1
    walk[BUTTONS.index("MOVE_LEFT" if rng.random() < 0.5 else "MOVE_RIGHT")] = int(rng.random() < 0.3)
    return [(turn, int(rng.integers(2, 12))), (walk, int(rng.integers(6, 30)))]


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
        held[strafe] = rng.random() < 0.35
        held[turn] = rng.random() < 0.6
        held[attack] = rng.random() < 0.2
        steps = rng.geometric(0.12)
    elif kind < 0.6:  # a long straight walk, often followed by a turn
        held[forward], held[strafe] = 1, rng.random() < 0.25
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
