"""Stream batch: several frames of one stream under way at once, each at another noise level, in one pass.

A frame enters at the noisiest level and moves one level on at every step. So a step costs one pass over N rows instead
of N passes, and a frame comes out N - 1 steps after it went in (Kodaira et al. 2023, StreamDiffusion, arXiv
2312.12491).

A causal memory does not fit that as it stands: a frame cannot attend to the clean frame before it, which is still on
its way. So every level has a memory of its own, in which frames were written as they passed that level (Xing et al.
2024, Live2Diff, arXiv 2407.08701), and no pass is spent on clean frames.

What is exact: the frames are those that N separate calls over these memories give, one frame after the other. What is
not: they differ from frames drawn without a stream batch, whose memory holds finished frames. Without memory (a window
of one frame) the two agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..samplers.rules import Euler, Renoise
from ..streaming import Chunk
from ..streaming.kv_cache import KVChunk
from .world_state import Flight, FlyingFrame, WorldState
from .world_video import PictureDrawer, columns


class StreamBatch(PictureDrawer):
    """The part of a world pipeline that keeps frames in flight."""

    rate: float

    def check_stream_batch(self) -> None:
        """Refuse rules that ask twice or remember: a frame's steps here are passes of their own."""
        rule = self.scheduler.rule
        if not isinstance(rule, (Euler, Renoise)) or rule.predicts_jumps:
            name = self.scheduler.config["rule"]
            raise ValueError(f"a stream batch needs a sampler whose rule is euler or renoise, this one's is {name!r}")

    def enter(self, state: WorldState, frame: FlyingFrame) -> list[Chunk]:
        """Noise a frame's picture and let it join those in flight.

        If it takes another number of steps than they do, they land first and are returned.
        """
        levels = len(frame.sigmas) - 1
        landed = self.drain(state) if state.flight and len(state.flight.rows) != levels else []
        if state.flight is None:
            state.flight = self.take_off(state, levels)
        frame.number = state.frame + len(state.flight.frames)
        (noise,) = self._fresh(torch.tensor([[state.seed], [frame.number]], device=self.arena.device), [0])
        frame.latents = self.scheduler.add_noise(frame.latents, noise, frame.sigmas[0])
        state.flight.frames.append(frame)
        return landed

    def take_off(self, state: WorldState, levels: int) -> Flight:
        """Rows for all levels, each with what the stream remembers."""
        saved = self.arena.cache.snapshot(state.row)
        rows = [self._take_row() for _ in range(levels - 1)]
        for row in rows:
            self.arena.cache.restore(row, saved)
        # Neighbours in memory, whose keys need no copy, if the arena has some: the stream's own row is the oldest.
        return Flight([*sorted(rows, reverse=True), state.row], [*[""] * len(rows), state.prompt])

    def drain(self, state: WorldState) -> list[Chunk]:
        """Move the frames under way to their end, in order, and give the extra rows back."""
        chunks = []
        while state.flight and state.flight.frames:
            chunks += [chunk for _, chunk in self.tick([state])]
        self.land(state)
        return chunks

    def land(self, state: WorldState) -> None:
        """Give the extra rows back; frames under way are lost."""
        if state.flight is not None:
            for row in state.flight.rows[:-1]:
                self.arena.give_back(row)
            state.prompt, state.flight = state.flight.prompts[-1], None

    def tick(self, states: Sequence[WorldState]) -> Iterator[tuple[WorldState, Chunk]]:
        """Move every frame in flight one level on, in one pass; yields those that are finished."""
        flying = [(state, state.flight, frame) for state in states if state.flight for frame in state.flight.frames]
        flying.sort(key=lambda entry: entry[1].rows[entry[2].step])
        for _, flight, frame in flying:
            if flight.prompts[frame.step] != frame.prompt:
                tokens = self.text_encoder.encode([frame.prompt]).to(self.arena.dtype)
                self.arena.read_prompt(flight.rows[frame.step], tokens)
                flight.prompts[frame.step] = frame.prompt
        self._move(flying)
        finished = [(state, flight) for state, flight, frame in flying if frame.step == len(flight.rows)]
        if finished:
            latents = torch.stack([flight.frames[0].latents for _, flight in finished])
            for (state, flight), picture in zip(finished, self.decode(latents)):
                yield state, self._finish(state, flight.frames.pop(0), picture)

    def _move(self, flying: Sequence[tuple[WorldState, Flight, FlyingFrame]]) -> None:
        frames = [frame for _, _, frame in flying]
        steps = tuple(frame.step for frame in frames)
        silence = self._silence(len(frames)) if any(frame.guidance_scale != 1 for frame in frames) else None

        def moved(
            chunk: KVChunk, numbers: Tensor, x: Tensor, actions: Tensor, levels: Tensor, weights: Tensor
        ) -> Tensor:
            sigma, sigma_next = levels.unbind()
            flow = self.guided_flow(x, sigma, self.arena.prompts(chunk.rows), silence, chunk, actions, weights)
            fresh = self._fresh(numbers, [step + 1 for step in steps]) if self.scheduler.needs_noise else None
            x, _ = self.scheduler.step(x, flow, sigma, sigma_next, noise=fresh)
            chunk.advance()
            return x

        chunk = self.arena.cache.open([flight.rows[frame.step] for _, flight, frame in flying])
        inputs = [
            torch.tensor([[state.seed for state, _, _ in flying], [frame.number for frame in frames]]),
            torch.stack([frame.latents for frame in frames]),
            torch.tensor([frame.action for frame in frames], dtype=self.arena.dtype)[:, None],
            columns([frame.sigmas[frame.step : frame.step + 2] for frame in frames]),
            columns([[frame.guidance_scale] for frame in frames])[0],
        ]
        drawn = self._run(("move", steps, self.scheduler.rule, silence is not None), moved, chunk, inputs)
        chunk.count()
        for frame, latents in zip(frames, drawn):
            frame.latents, frame.step = latents, frame.step + 1

    def _fresh(self, numbers: Tensor, draws: Sequence[int]) -> Tensor:
        """Noise [B, C, 1, h, w] as `draw` would take it: for each (seed, frame) in `numbers` [2, B] its own draw."""
        return torch.cat([self._noise_of(numbers[:, row : row + 1], draw) for row, draw in enumerate(draws)])

    def _finish(self, state: WorldState, frame: FlyingFrame, picture: Tensor) -> Chunk:
        state.latents = frame.latents[:, 0]
        state.frame += 1
        return self.handed_out(state, picture, frame.version, frame.time)

    def handed_out(self, state: WorldState, picture: Tensor, version: int, time: float) -> Chunk:
        """The next chunk of a stream, from `picture` [1, 3, H, W]."""
        state.given += 1
        return Chunk("video", picture, state.given - 1, self.rate, version, time)
