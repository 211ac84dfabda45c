"""What a session asks of a world (`Streamable`): check, begin, advance, flush, save, load, end.

Each stream is advanced in one of four ways: a frame is *imagined* (nothing is shown to it, or strength 1), *shown* (a
true picture, remembered as it is), *redrawn* (a picture, changed by the control's strength) or put into a *stream
batch*. Streams that go the same way with the same number of steps go through the network together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from threading import RLock
from typing import Literal

import torch
from torch import Tensor

from ..streaming import Chunk, Frame, WorldControl
from ..streaming.types import Leaves
from .inputs import keep_shown, leaves_out, strength_for
from .stream_batch import StreamBatch
from .world_state import Flight, FlyingFrame, WorldState, from_leaves, to_leaves

MOST_TURNS_OWED = 9  # half a second: a flick of the mouse must not go on turning for longer


@dataclass(slots=True)
class Job:
    """One stream in one step. `levels` are those that a redrawn picture goes through."""

    way: Literal["imagined", "shown", "redrawn"]
    state: WorldState
    control: WorldControl
    frame: Frame | None
    levels: list[float]

    @property
    def kind(self) -> tuple[str, int, float]:
        """What must agree for streams to share their passes."""
        if self.way == "shown":
            return self.way, 0, 1.0
        steps = len(self.levels) if self.way == "redrawn" else self.control.num_inference_steps or 0
        return self.way, steps, float(self.control.guidance_scale)


class WorldStreams(StreamBatch):
    """The part of a world pipeline that its sessions see."""

    _worlds: tuple[str, ...]
    buttons: list[str]
    key_map: dict[str, str]
    pixels_per_turn: float
    _sharing: RLock  # sessions may run on threads of their own, and one that opens may move the arena

    def check(self, control: WorldControl) -> None:
        """Refuse keys that press nothing here, an empty prompt and a number of steps the sampler does not know."""
        if not control.prompt.strip():
            example = self._worlds[0] if self._worlds else "a brick corridor with soldiers"
            raise ValueError(f'the prompt is empty; describe a world, for example "{example}"')
        if any("\ud800" <= character <= "\udfff" for character in control.prompt):
            raise ValueError("the prompt holds half a character (a lone surrogate); send it as UTF-8")
        unknown = sorted(control.keys - self.key_map.keys())
        if unknown:
            raise ValueError(f"unknown key {', '.join(unknown)}; the keys of this world are {', '.join(self.key_map)}")
        self.scheduler.sigmas(control.num_inference_steps)
        if control.stream_batch:
            self.check_stream_batch()

    def begin(self, control: WorldControl, *, generator: torch.Generator | None = None) -> WorldState:
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else None))
        with self._sharing:
            return WorldState(self._take_row(), seed)

    @torch.no_grad()
    def advance(
        self, states: Sequence[WorldState], controls: Sequence[WorldControl], media: Sequence[Frame | None]
    ) -> Sequence[Sequence[Chunk]]:
        """One frame for every state, and what a stream batch gives before and instead of it."""
        for frame in media:
            if frame is not None:
                self._check_picture(frame.data)
        chunks: dict[int, list[Chunk]] = {state.row: [] for state in states}
        with self._sharing:
            jobs: list[Job] = []
            flying: list[WorldState] = []
            for state, control, frame in zip(states, controls, media):
                if frame is None or not control.strength:
                    chunks[state.row] += self.drain(state)
                    jobs.append(Job("imagined" if frame is None else "shown", state, control, frame, []))
                elif self._is_still(state, control) and leaves_out(state, control, frame.data):
                    if state.flight and state.flight.frames:
                        flying.append(state)  # what is under way comes first, so that time never runs backwards
                    else:
                        chunks[state.row].append(self._again(state, control.version, frame.time))
                elif control.stream_batch:
                    chunks[state.row] += self.enter(state, self._flying(state, control, frame))
                    flying.append(state)
                else:
                    chunks[state.row] += self.drain(state)
                    jobs.append(self._redraw_job(state, control, frame))
            for state, chunk in self._advance_jobs(jobs, flying):
                chunks[state.row].append(chunk)
            for state, control in zip(states, controls):
                keep_shown(state, control, chunks[state.row])
                if not chunks[state.row] and state.picture is not None:
                    chunks[state.row].append(self._again(state, state.shown_version, state.shown_time))
        return [chunks[state.row] for state in states]

    def _advance_jobs(self, jobs: list[Job], flying: list[WorldState]) -> Iterator[tuple[WorldState, Chunk]]:
        jobs.sort(key=lambda job: (job.kind, job.state.row))
        for _, group in groupby(jobs, key=lambda job: job.kind):
            yield from self._advance_group(list(group))
        if flying:
            yield from self.tick(flying)

    @torch.no_grad()
    def flush(self, state: WorldState) -> Sequence[Chunk]:
        """The frames of a stream batch that are still under way."""
        with self._sharing:
            return self.drain(state)

    def save(self, state: WorldState) -> Leaves:
        with self._sharing:
            rows = state.flight.rows if state.flight else [state.row]
            return to_leaves(state, [self.arena.cache.snapshot(row) for row in rows])

    @torch.no_grad()  # with gradients the prompt encoder takes another path, which differs in the last bit
    def load(self, leaves: Leaves) -> WorldState:
        caches, frames, plain = from_leaves(leaves)
        with self._sharing:
            rows: list[int] = []
            try:
                for cache in caches:
                    rows.append(self._take_row())
                    self.arena.cache.restore(rows[-1], cache)
                state = WorldState(row=rows[-1], **plain)
                self._read_prompt(state, state.prompt)
            except BaseException:
                for row in rows:
                    self.arena.give_back(row)
                raise
            for frame in frames:
                frame.latents = frame.latents.to(self.arena.device)
            if frames or len(rows) > 1:  # without frames there are still the memories of their levels
                state.flight = Flight(rows, [*[""] * (len(rows) - 1), state.prompt], frames)
            return state

    def end(self, state: WorldState) -> None:
        with self._sharing:
            self.land(state)
            row, state.row = state.row, -1
            if row >= 0:
                self.arena.give_back(row)

    def _advance_group(self, jobs: Sequence[Job]) -> Iterator[tuple[WorldState, Chunk]]:
        """A frame for each of these streams, which go the same way."""
        states, control = [job.state for job in jobs], jobs[0].control
        for job in jobs:
            if job.state.prompt != job.control.prompt:
                self._read_prompt(job.state, job.control.prompt)
        chunk = self.arena.cache.open([state.row for state in states])
        actions = torch.tensor(
            [self._action(job.state, job.control) for job in jobs], device=self.arena.device, dtype=self.arena.dtype
        )[:, None]
        pictures = [job.frame.data for job in jobs if job.frame is not None]
        if jobs[0].way == "imagined":
            latents = self.draw(states, chunk, actions, control)
        elif jobs[0].way == "shown":
            latents = self.encode(pictures)
        else:
            levels = [job.levels for job in jobs]
            latents = self.redraw(states, chunk, actions, control.guidance_scale, pictures, levels)
        self.remember(states, latents, chunk, actions)
        for job, latent, picture in zip(jobs, latents, self.decode(latents)):
            job.state.latents = latent[:, 0]
            job.state.frame += 1
            when = time.monotonic() if job.frame is None else job.frame.time
            yield job.state, self.handed_out(job.state, picture, job.control.version, when)

    def _redraw_job(self, state: WorldState, control: WorldControl, frame: Frame) -> Job:
        strength = strength_for(state, control, frame.data)
        way = "imagined" if strength == 1 else "redrawn"
        return Job(way, state, control, frame, self.levels(control, strength))

    def _flying(self, state: WorldState, control: WorldControl, frame: Frame) -> FlyingFrame:
        levels = self.levels(control, strength_for(state, control, frame.data))
        return FlyingFrame(
            latents=self.encode([frame.data]).float()[0],
            sigmas=levels,
            number=state.frame,
            action=self._action(state, control),
            prompt=control.prompt,
            guidance_scale=control.guidance_scale,
            version=control.version,
            time=frame.time,
        )

    def _is_still(self, state: WorldState, control: WorldControl) -> bool:
        """Nothing is steered that would move the view."""
        return not control.keys and not control.mouse[0] and abs(state.turn) < self.pixels_per_turn

    def _again(self, state: WorldState, version: int, when: float) -> Chunk:
        assert state.picture is not None
        return self.handed_out(state, state.picture.clone(), version, when)

    def _check_picture(self, picture: Tensor) -> None:
        """Called before any stream moves, so that one bad picture costs the others nothing."""
        if tuple(picture.shape) != (3, *self.size) or not picture.is_floating_point():
            raise ValueError(
                f"a frame of this world is [3, {self.size[0]}, {self.size[1]}] in floats from 0 to 1, got "
                f"{list(picture.shape)} in {picture.dtype}; millstream.streaming.fit(picture, pipe.size) makes it so"
            )

    def _action(self, state: WorldState, control: WorldControl) -> list[float]:
        """Which buttons are pressed; mouse movement to the side is paid out in turns."""
        pressed = {self.key_map[key] for key in control.keys}
        limit = MOST_TURNS_OWED * self.pixels_per_turn
        state.turn = max(-limit, min(limit, state.turn + control.mouse[0]))
        if abs(state.turn) >= self.pixels_per_turn:
            pressed.add("TURN_RIGHT" if state.turn > 0 else "TURN_LEFT")
            state.turn -= self.pixels_per_turn * (1 if state.turn > 0 else -1)
        return [float(button in pressed) for button in self.buttons]
