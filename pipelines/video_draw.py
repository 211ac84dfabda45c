"""How a stream of video draws its next chunk, as a `Recipe` says: which passes of `video_passes`, in which order.

Latents are [B, C, F, h, w], float32; a chunk is F latent frames of one stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..samplers import Renoise, Triangle, add_noise, integrate
from ..streaming.kv_cache import KVChunk
from .presets import attend_at, kept_attention
from .video_passes import VideoPasses, numbers
from .video_state import Finished, VideoState


class VideoDrawer(VideoPasses):
    """The part of a video pipeline that follows the recipe's plan."""

    def draw(self, state: VideoState, given: Tensor | None, strength: float, version: int) -> list[Finished]:
        """Let a chunk begin, from noise or from `given` latents [C, F, h, w]; returns the chunks it finishes."""
        if self.recipe.plan == "staircase":
            return [Finished(self._staircase(state, given, strength), version)]
        fresh, told = self._entering(state, given, strength)
        if self.recipe.plan == "triangle":
            state.join(fresh[0], version)
            return self._triangle(state, ends=False)
        if state.step == 0:
            return [Finished(self._first_of_batch(state, fresh, told), version)]
        state.join(fresh[0], version)
        state.step += 1
        return self._batch(state, 0, told)

    def complete(self, state: VideoState) -> list[Finished]:
        """Finish what is under way; nothing new begins, and the next chunk begins as a stream's first."""
        done: list[Finished] = []
        if state.flying is not None:
            if self.recipe.plan == "triangle":
                done = self._triangle(state, ends=True)
            else:
                for lead in range(1, len(self.recipe.timesteps)):
                    done += self._batch(state, lead, 0.0)
        state.step = 0
        return done

    def _entering(self, state: VideoState, given: Tensor | None, strength: float) -> tuple[Tensor, float]:
        """A chunk at its first level [1, C, F, h, w], and the level that the model is told it has."""
        recipe = self.recipe
        frame = state.frame + (0 if state.flying is None else state.flying.shape[1])
        noise = self._noise(state, frame, recipe.chunk, 0)
        if given is None:
            return noise, 1.0
        if recipe.plan == "batch":
            level = strength - recipe.motion * state.motion
            return add_noise(given[None], noise, level), level - recipe.told_less
        first = recipe.sigmas(strength)[0]
        return add_noise(given[None], noise, first), first

    def _staircase(self, state: VideoState, given: Tensor | None, strength: float) -> Tensor:
        """Finish one chunk: [C, F, h, w]."""
        recipe = self.recipe
        if recipe.overlap and state.step + recipe.chunk > recipe.window:
            self.begin_anew(state)
        sigmas = recipe.sigmas(1.0 if given is None else strength)
        chunk = self.arena.cache.open(state.rows, recipe.chunk)
        heard = self.heard(state, state.shot, recipe.chunk)
        x = self._drawn(state, None if given is None else given[None], sigmas, chunk, heard)
        state.step += recipe.chunk
        # A memory that begins anew before the next chunk need not be written.
        if not recipe.overlap or state.step + recipe.chunk <= recipe.window:
            self._write(state, x, chunk)
        state.note(x[0])
        return x[0]

    def _drawn(
        self, state: VideoState, given: Tensor | None, sigmas: Sequence[float], chunk: KVChunk, heard: list[Tensor]
    ) -> Tensor:
        """A chunk [1, C, F, h, w] through all its levels, from noise or from `given`, which is noised to the first."""

        def drawn(chunk: KVChunk, numbers: Tensor, *given: Tensor) -> Tensor:
            self.taken(chunk, given[: len(heard)])
            given, count = given[len(heard) :], chunk.num_frames
            if len(sigmas) > 1:
                self._prepare(sigmas[:-1], chunk)
            kept = kept_attention(self.preset, self.arena.cache)

            def denoise(x: Tensor, sigma: float) -> Tensor:
                attend_at(sigmas.index(sigma), len(sigmas) - 1, self.preset, chunk, kept)
                return self._flow(x, self._condition(sigma, chunk), chunk)

            x = self._noise_of(numbers, count, 0)
            x = add_noise(given[0], x, sigmas[0]) if given else x
            noised = integrate(
                denoise, x, sigmas, Renoise(), noise=lambda step: self._noise_of(numbers, count, step + 1)
            )
            chunk.reuse = None
            return noised

        inputs = [numbers(state), *heard] + ([] if given is None else [given])
        return self._run(("draw", tuple(sigmas)), drawn, chunk, inputs)

    def _triangle(self, state: VideoState, *, ends: bool) -> list[Finished]:
        """All chunks under way together: the passes until the next may enter, or until none is left."""
        recipe, sigmas = self.recipe, self.recipe.sigmas()
        plan = Triangle(sigmas, recipe.units, chunk=recipe.chunk)
        if not ends:
            state.step += 1
        frames = state.step * recipe.chunk
        begin = plan.start(state.step if ends else state.step - 1)
        done: list[Finished] = []
        for step in range(begin, plan.steps(frames) if ends else plan.start(state.step)):
            row = plan.row(step, frames if ends else None)
            state.flying = self._climbed(state, row.sigma_from, row.sigma_to)
            if len(row.commit):
                first = state.flying[None, :, : recipe.chunk]
                self._write(state, first, self.arena.cache.open(state.rows, recipe.chunk))
                done.append(state.leave(recipe.chunk))
        return done

    def _climbed(self, state: VideoState, sigma_from: Sequence[float], sigma_to: Sequence[float]) -> Tensor:
        """One pass over all frames under way [C, n, h, w], each from its own level to its next."""
        assert state.flying is not None
        size, sigmas = self.recipe.chunk, self.recipe.sigmas()
        steps = tuple(sigmas.index(level) + 1 for level in sigma_from[::size])

        def climbed(chunk: KVChunk, numbers: Tensor, x: Tensor, levels: Tensor) -> Tensor:
            flow = self._flow(x, 1000 * levels[:1], chunk)
            noise = [self._noise_of(numbers, size, step, unit * size) for unit, step in enumerate(steps)]
            before, after = levels[:, None, :, None, None].split(1)
            return Renoise().step(x, flow, before, after, noise=torch.cat(noise, dim=2))[0]

        chunk = self.arena.cache.open(state.rows, state.flying.shape[1])
        levels = torch.tensor([list(sigma_from), list(sigma_to)], dtype=torch.float32)
        return self._run(("climb", steps), climbed, chunk, [numbers(state), state.flying[None], levels])[0]

    def _first_of_batch(self, state: VideoState, x: Tensor, told: float) -> Tensor:
        """The first chunk goes through its levels alone; what it leaves in memory is every level's beginning."""
        recipe, cache, row = self.recipe, self.arena.cache, state.rows[:1]
        chunk = cache.open(row, recipe.chunk)
        x = integrate(
            lambda x, sigma: self._flow(x, torch.full((1, 1), 1000 * sigma, device=x.device), chunk),
            x,
            [told, *recipe.sigmas()[1:]],
            Renoise(),
            noise=lambda step: self._noise(state, state.frame, recipe.chunk, step + 1),
        )
        chunk.commit()
        saved = cache.snapshot(row[0])
        for other in state.rows[1:]:
            cache.restore(other, saved)
        state.step = 1
        state.note(x[0])
        return x[0]

    def _batch(self, state: VideoState, lead: int, told: float) -> list[Finished]:
        """One pass over all chunks under way, each in the row of its level; the newest stands at level `lead`."""
        size, sigmas = self.recipe.chunk, self.recipe.sigmas()
        if state.flying is None:
            return []
        count = state.flying.shape[1] // size
        steps = range(lead, lead + count)
        last = state.flying.shape[1]

        def moved(chunk: KVChunk, numbers: Tensor, flying: Tensor, levels: Tensor) -> Tensor:
            x = torch.stack(flying.split(size, dim=1)[::-1])  # the newest first, as rows are
            flow = self._flow(x, 1000 * levels[:1].T, chunk)
            chunk.advance()
            noise = [
                self._noise_of(numbers, size, step + 1, last - (number + 1) * size) for number, step in enumerate(steps)
            ]
            before, after = (each.reshape(-1, 1, 1, 1, 1) for each in levels)
            x, _ = Renoise().step(x, flow, before, after, noise=torch.cat(noise))
            return torch.cat(list(x.flip(0)), dim=1)

        chunk = self.arena.cache.open([state.rows[step] for step in steps], size)
        before = [told if step == 0 else sigmas[step] for step in steps]
        levels = torch.tensor([before, [sigmas[step + 1] for step in steps]], dtype=torch.float32)
        inputs = [numbers(state), state.flying, levels]
        state.flying = self._run(("batch", tuple(steps)), moved, chunk, inputs)
        chunk.count()
        return [state.leave(size)] if steps[-1] == len(sigmas) - 2 else []

    def show(self, state: VideoState, latents: Tensor) -> None:
        """Let a stream begin with a frame [C, 1, h, w] that is given."""
        self._write(state, latents[None], self.arena.cache.open(state.rows[:1], 1))
        state.note(latents)
        state.still, state.step = latents, 1 if self.recipe.plan == "staircase" else 0

    def begin_anew(self, state: VideoState) -> None:
        """Remember the last few frames alone, the first of them encoded again: a first frame stands for one picture."""
        count = min(self.recipe.overlap, state.shot)
        frames = state.recall(count)
        if count < state.shot:
            assert state.corner is not None
            frames[:, :1] = self.encode_still(state.corner)
        self.forget(state)
        self._write(state, frames[None], self.arena.cache.open(state.rows, count))
        state.step = count

    def replay(self, state: VideoState) -> None:
        """Remember the last window of finished frames under the prompt as it is now, chunk by chunk."""
        self.forget(state)
        frames = state.recall(min(self.recipe.window, state.shot))
        odd = frames.shape[1] % self.recipe.chunk
        blocks = [frames[:, :odd]] if odd else []
        blocks += frames[:, odd:].split(self.recipe.chunk, dim=1) if frames.shape[1] > odd else []
        for block in blocks:
            self._write(state, block[None], self.arena.cache.open(state.rows[:1], block.shape[1]))

    def forget(self, state: VideoState) -> None:
        for row in state.rows:
            self.arena.cache.reset(row)
