"""Which noise levels a sampler visits: n + 1 decreasing values that end at 0.

A schedule is a value: it keeps its configuration and nothing else, and travels in a `scheduler_config.json`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin


class FlowSchedule(SchedulerMixin, ConfigMixin):
    """Evenly spaced levels, warped towards the noisy end: sigma = shift s / (1 + (shift - 1) s).

    Source: Esser et al. 2024 (arXiv 2403.03206), equation 23.

    Args:
        shift: 1 keeps the levels evenly spaced; larger values spend more steps where it is noisy.

    Raises:
        ValueError: shift is not positive and finite.
    """

    @register_to_config
    def __init__(self, shift: float = 1.0) -> None:
        check_shift(shift)

    def sigmas(self, n: int, *, strength: float = 1.0) -> list[float]:
        """The levels of `n` steps, from warp(strength) to 0.

        Args:
            n: number of steps, at least 1.
            strength: where to start, in (0, 1]: 1 draws from pure noise, less keeps part of an input.

        Raises:
            ValueError: an argument out of range.
        """
        check_count(n)
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1 (pure noise), got {strength}")
        return [warp(strength * (n - i) / n, self.config["shift"]) for i in range(n + 1)]


class WarpedSchedule(SchedulerMixin, ConfigMixin):
    """A published list of timesteps, looked up in the table of a shifted schedule.

    Distilled models are trained at a few timesteps and should be run at those. Self-Forcing's [1000, 750, 500, 250] at
    shift 5 become 1000, 937.5, 833.3, 625. With the default shift of 1 the list is taken as it stands.

    Args:
        timesteps: strictly decreasing, each above 0 and at most num_train_timesteps; the final 0 is implied.
        shift: as in `FlowSchedule`.
        num_train_timesteps: the timestep of pure noise.

    Raises:
        ValueError: an empty or unordered list, timesteps out of range, or a shift that is not positive and finite.
    """

    @register_to_config
    def __init__(self, timesteps: Sequence[float], shift: float = 1.0, num_train_timesteps: int = 1000) -> None:
        check_shift(shift)
        check_count(num_train_timesteps, "num_train_timesteps")
        check_timesteps(timesteps, num_train_timesteps)

    def sigmas(self, n: int | None = None) -> list[float]:
        """The listed levels and the final 0. `n` may only repeat how many are listed: no other steps were trained."""
        timesteps = self.config["timesteps"]
        if n is not None and n != len(timesteps):
            raise ValueError(
                f"this schedule lists {len(timesteps)} steps, {list(timesteps)}, so n must be {len(timesteps)} or "
                f"None, got {n}; for a free number of steps use FlowSchedule"
            )
        return [warp(t / self.config["num_train_timesteps"], self.config["shift"]) for t in timesteps] + [0.0]


class TrigSchedule(SchedulerMixin, ConfigMixin):
    """Angles from `start` down to 0, for models that noise along a circle: x_t = cos(t) x0 + sin(t) sigma_data eps.

    Source: TrigFlow, Lu and Song 2024 (arXiv 2410.11081), section 3. Their start is atan(80 / 0.5) = 1.56454.

    Args:
        start: the first angle, in (0, pi / 2]; pi / 2 is pure noise.
        angles: take these instead (strictly decreasing, the final 0 implied), such as (1.5708, 1.3).

    Raises:
        ValueError: an angle out of range, or angles that don't decrease.
    """

    @register_to_config
    def __init__(self, start: float = math.pi / 2, angles: Sequence[float] | None = None) -> None:
        # Published lists round pi / 2 up to 1.5708, and that is what their models were run at.
        check_timesteps((start,) if angles is None else angles, QUARTER_TURN, "angles")

    def sigmas(self, n: int | None = None) -> list[float]:
        """The angles of `n` steps, and the final 0. `n` is needed unless the schedule lists its angles."""
        angles = self.config["angles"]
        if angles is None:
            n = check_count(n)
            return [self.config["start"] * (n - i) / n for i in range(n + 1)]
        if n is not None and n != len(angles):
            raise ValueError(f"this schedule lists {len(angles)} angles, so n must be {len(angles)} or None, got {n}")
        return [*map(float, angles), 0.0]


QUARTER_TURN = 1.5708
"""pi / 2 as published configurations round it."""


def warp(s: float, shift: float) -> float:
    """shift s / (1 + (shift - 1) s), written so that 0 and 1 stay exactly 0 and 1 for every shift."""
    return s / (s + (1 - s) / shift)


def check_shift(shift: float) -> None:
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be positive and finite (1 leaves the levels evenly spaced), got {shift}")


def check_count(n: int | None, name: str = "n") -> int:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {n!r}")
    return n


def check_timesteps(timesteps: Sequence[float], highest: float, name: str = "timesteps") -> None:
    in_range = all(0 < t <= highest for t in timesteps)
    decreasing = all(a > b for a, b in pairwise(timesteps))
    if not (len(timesteps) and in_range and decreasing):
        raise ValueError(
            f"{name} must be one or more strictly decreasing values above 0 and at most {highest:g} (the final 0 is "
            f"implied), got {list(timesteps)}"
        )
