"""Who is denoised when: at each step, which frames are unfinished, and from which level to which they move.

Frames are grouped in units of `chunk` frames that share their level. With a schedule of K steps S[0] > ... > S[K],
unit u enters at step start(u), and at step k it moves from S[j] to S[j + 1], where j = k - start(u). The plans differ
only in how far apart the units enter:

    OneShot      all frames are one unit    a whole clip, bidirectional
    Staircase    K steps apart              block-causal: one unit after the other (Self-Forcing, the world model)
    Lag          `lag` steps apart          each unit trails the one before it by a few steps
    Triangle     K / units steps apart      `units` units at graded levels (diffusion forcing, FloodDiffusion, Rolling
                                            Forcing; with the units in the batch axis, StreamDiffusion)

All arithmetic is in integers: floors of floating-point times miscount.

A plan is a value and `row` a pure function of the step, so a stream keeps one integer and can be resumed anywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import NamedTuple

from .schedules import check_count


class Row(NamedTuple):
    """One step of a plan.

    Attributes:
        active: the frames that move, consecutive.
        sigma_from: the level each active frame stands at; as long as `active`.
        sigma_to: the level it reaches.
        commit: those of the active frames that are finished after this step; may be empty.
    """

    active: range
    sigma_from: tuple[float, ...]
    sigma_to: tuple[float, ...]
    commit: range


@dataclass(frozen=True)
class Plan(ABC):
    """What all plans share.

    Args:
        sigmas: the K + 1 levels every frame goes through, strictly decreasing: what a schedule's `sigmas` returns.

    Raises:
        ValueError: fewer than two levels, or levels that don't decrease.
    """

    sigmas: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(map(float, self.sigmas)))
        if len(self.sigmas) < 2 or not all(a > b for a, b in pairwise(self.sigmas)):
            raise ValueError(
                f"sigmas must be two or more decreasing levels such as [1.0, 0.5, 0.0], got {list(self.sigmas)}"
            )

    @property
    def steps_per_frame(self) -> int:
        """K: how many steps each frame takes."""
        return len(self.sigmas) - 1

    @abstractmethod
    def steps(self, n_frames: int) -> int:
        """How many rows a clip of `n_frames` (at least 1) takes."""

    @abstractmethod
    def row(self, step: int, n_frames: int | None = None) -> Row:
        """One row of the plan.

        Args:
            step: which one, from 0; below `steps(n_frames)` if the clip has an end.
            n_frames: length of the clip, at least 1; None for a stream without end.

        Raises:
            ValueError: an argument out of range.
        """

    def rows(self, n_frames: int | None) -> Iterator[Row]:
        """All rows in order: one at a time, and without end if `n_frames` is None."""
        for step in count() if n_frames is None else range(self.steps(n_frames)):
            yield self.row(step, n_frames)

    def flush(self, step: int) -> Iterator[Row]:
        """What is left to do when an endless stream stops after its first `step` rows: nothing new enters.

        So the units under way are completed instead of lost. Empty if none is.
        """
        if step > 0:
            n_frames = self.row(step - 1).active.stop
            for later in range(step, self.steps(n_frames)):
                yield self.row(later, n_frames)


@dataclass(frozen=True)
class OneShot(Plan):
    """All frames together. It needs to know how many, so it has no endless form."""

    def steps(self, n_frames: int) -> int:
        check_count(n_frames, "n_frames")
        return self.steps_per_frame

    def row(self, step: int, n_frames: int | None = None) -> Row:
        if n_frames is None:
            raise ValueError("a one-shot plan denoises all frames together: give n_frames, or use Staircase to stream")
        check_step(step, self.steps(n_frames))
        everything = range(n_frames)
        return Row(
            active=everything,
            sigma_from=(self.sigmas[step],) * n_frames,
            sigma_to=(self.sigmas[step + 1],) * n_frames,
            commit=everything if step == self.steps_per_frame - 1 else range(0),
        )


@dataclass(frozen=True)
class Staggered(Plan):
    """Units that enter one after the other at a steady pace: what Staircase, Lag and Triangle have in common.

    Args:
        chunk: frames per unit; the last unit of a clip is shorter if the clip isn't a multiple of it.
    """

    chunk: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        Plan.__post_init__(self)
        check_count(self.chunk, "chunk")

    @property
    @abstractmethod
    def pace(self) -> tuple[int, int]:
        """(p, q): q units enter in every p steps, so that start(u) = ceil(u p / q)."""

    def start(self, unit: int) -> int:
        """The step at which a unit enters."""
        p, q = self.pace
        return -(-unit * p // q)

    def entered(self, step: int) -> int:
        """How many units have entered by the end of `step`: those with start(u) <= step."""
        p, q = self.pace
        return max(0, step * q // p + 1)

    def steps(self, n_frames: int) -> int:
        check_count(n_frames, "n_frames")
        return self.start((n_frames - 1) // self.chunk) + self.steps_per_frame

    def row(self, step: int, n_frames: int | None = None) -> Row:
        check_step(step, None if n_frames is None else self.steps(n_frames))
        first = self.entered(step - self.steps_per_frame) * self.chunk
        stop = self.entered(step) * self.chunk
        active = range(first, stop if n_frames is None else min(stop, n_frames))
        progress = [step - self.start(frame // self.chunk) for frame in active]
        return Row(
            active=active,
            sigma_from=tuple(self.sigmas[j] for j in progress),
            sigma_to=tuple(self.sigmas[j + 1] for j in progress),
            commit=range(first, first + progress.count(self.steps_per_frame - 1)),
        )


@dataclass(frozen=True)
class Staircase(Staggered):
    """One unit after the other, each finished before the next enters."""

    @property
    def pace(self) -> tuple[int, int]:
        return self.steps_per_frame, 1


@dataclass(frozen=True)
class Lag(Staggered):
    """Each unit trails the one before it by `lag` steps.

    Args:
        lag: from 1 to K; at K it is the staircase.
    """

    lag: int

    def __post_init__(self) -> None:
        Staggered.__post_init__(self)
        check_count(self.lag, "lag")
        if self.lag > self.steps_per_frame:
            raise ValueError(
                f"lag must be at most {self.steps_per_frame}, the steps a frame takes (then it is the staircase), "
                f"got {self.lag}"
            )

    @property
    def pace(self) -> tuple[int, int]:
        return self.lag, 1


@dataclass(frozen=True)
class Triangle(Staggered):
    """`units` units under way at once, at evenly graded levels, the oldest the cleanest.

    units = 1 is the staircase. FloodDiffusion is 5 units and K = 10, Rolling Forcing 5 units of chunk 3 and K = 5.
    As a stream batch, unit u stands in batch slot u % units; the first result comes after K steps.

    Source: Diffusion Forcing, Chen et al. 2024 (arXiv 2407.01392); Rolling Forcing, Liu et al. 2025 (arXiv 2509.25161);
    StreamDiffusion, Kodaira et al. 2023 (arXiv 2312.12491).

    Args:
        units: at least 1.
    """

    units: int

    def __post_init__(self) -> None:
        Staggered.__post_init__(self)
        check_count(self.units, "units")

    @property
    def pace(self) -> tuple[int, int]:
        return self.steps_per_frame, self.units


def check_step(step: int, end: int | None) -> None:
    if step < 0 or (end is not None and step >= end):
        raise ValueError(f"step must be {'at least 0' if end is None else f'from 0 to {end - 1}'}, got {step}")
