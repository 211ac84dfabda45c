"""How a stream of video draws its next chunk: denoise, remember, decode, as a `Recipe` says.

Cut from `VideoPipeline`, which decides what is drawn for whom; here is only the network at work on the arena's rows.
Latents are [B, C, F, h, w], float32; a chunk is F latent frames of one stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from ..kernels import philox_normal
from ..models.mixers import make_cache
from ..models.stream_codec import PICTURES_PER_LATENT, CodecState
from ..models.tiny_vae import TinyVideoDecoder
from ..models.transformer import CausalTransformer3DModel
from ..models.wan_vae import AutoencoderKLWan, WanDecoder, WanEncoder
from ..samplers import Renoise, Triangle, add_noise, integrate
from ..streaming.kv_cache import KVCache, KVChunk
from .recipes import Recipe
from .rows import RowArena
from .video_prompts import PromptReader
from .video_state import Finished, VideoState

CONTEXT_NOISE = 1 << 20  # the noise step of the pass that remembers; sampler steps count from 0


class VideoDrawer(PromptReader):
    """The part of a video pipeline that runs the network."""

    transformer: CausalTransformer3DModel
    vae: AutoencoderKLWan
    decoder: TinyVideoDecoder | None
    recipe: Recipe
    _size: tuple[int, int]
    _arena: RowArena | None
    _encoder: WanEncoder
    _decoder: WanDecoder | TinyVideoDecoder
    _still: CodecState | None  # an encoder's for single pictures
    _sharing: RLock

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of its pictures in pixels; see `resize`."""
        return self._size

    @property
    def arena(self) -> RowArena:
        """Memory of the running streams."""
        if self._arena is None:
            self._arena = RowArena(self._make_cache, self.transformer)
        return self._arena

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """C, h, w."""
        pixels = self.vae.config["scale_factor_spatial"]
        return self.vae.config["z_dim"], self.size[0] // pixels, self.size[1] // pixels

    @property
    def codec(self) -> WanDecoder | TinyVideoDecoder:
        """What decodes."""
        return self._decoder

    def _make_cache(self, rows: int) -> KVCache:
        return make_cache(self.transformer, **self.cache_shape(rows))

    def cache_shape(self, rows: int) -> dict[str, Any]:
        """Arguments of a `KVCache` with so many rows for pictures of the present size."""
        config, recipe = self.transformer.config, self.recipe
        _, patch_h, patch_w = config["patch_size"]
        _, height, width = self.latent_size
        return {
            "layers": config["num_layers"],
            "rows": rows,
            "heads": config["num_attention_heads"],
            "head_dim": config["attention_head_dim"],
            "tokens_per_frame": (height // patch_h) * (width // patch_w),
            "window": recipe.memory,
            "position": recipe.position,
            "spare": recipe.spare,
        }

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
        x, _ = self._entering(state, given, strength)
        chunk = self.arena.cache.open(state.rows, recipe.chunk)
        x = integrate(
            lambda x, sigma: self._flow(x, self._told(sigma), chunk),
            x,
            recipe.sigmas(1.0 if given is None else strength),
            Renoise(),
            noise=lambda step: self._noise(state, state.frame, recipe.chunk, step + 1),
        )
        state.step += recipe.chunk
        # A memory that begins anew before the next chunk need not be written.
        if not recipe.overlap or state.step + recipe.chunk <= recipe.window:
            self._write(state, x, chunk)
        state.note(x[0])
        return x[0]

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
            assert state.flying is not None
            row = plan.row(step, frames if ends else None)
            x, levels = state.flying[None], row.sigma_from[:: recipe.chunk]
            flow = self._flow(x, 1000 * self._levels(row.sigma_from), self.arena.cache.open(state.rows, x.shape[2]))
            noise = torch.cat(
                [
                    self._noise(state, state.frame + unit * recipe.chunk, recipe.chunk, sigmas.index(level) + 1)
                    for unit, level in enumerate(levels)
                ],
                dim=2,
            )
            before, after = (self._levels(each)[:, None, :, None, None] for each in (row.sigma_from, row.sigma_to))
            x, _ = Renoise().step(x, flow, before, after, noise=noise)
            state.flying = x[0]
            if len(row.commit):
                self._write(state, x[:, :, : recipe.chunk], self.arena.cache.open(state.rows, recipe.chunk))
                done.append(state.leave(recipe.chunk))
        return done

    def _first_of_batch(self, state: VideoState, x: Tensor, told: float) -> Tensor:
        """The first chunk goes through its levels alone; what it leaves in memory is every level's beginning."""
        recipe, cache, row = self.recipe, self.arena.cache, state.rows[:1]
        chunk = cache.open(row, recipe.chunk)
        sigmas = [told, *recipe.sigmas()[1:]]
        x = integrate(
            lambda x, sigma: self._flow(x, self._told(sigma), chunk),
            x,
            sigmas,
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
        recipe, sigmas = self.recipe, self.recipe.sigmas()
        if state.flying is None:
            return []
        x = torch.stack(state.flying.split(recipe.chunk, dim=1)[::-1])  # the newest first, as rows are
        levels = range(lead, lead + len(x))
        before = [told if level == 0 else sigmas[level] for level in levels]
        chunk = self.arena.cache.open([state.rows[level] for level in levels], recipe.chunk)
        flow = self._flow(x, 1000 * self._levels(before).T, chunk)
        chunk.commit()
        last = state.frame + state.flying.shape[1]
        noise = torch.cat(
            [
                self._noise(state, last - (number + 1) * recipe.chunk, recipe.chunk, level + 1)
                for number, level in enumerate(levels)
            ]
        )
        after = [sigmas[level + 1] for level in levels]
        at, to = (self._levels(each).reshape(-1, 1, 1, 1, 1) for each in (before, after))
        x, _ = Renoise().step(x, flow, at, to, noise=noise)
        state.flying = torch.cat(list(x.flip(0)), dim=1)
        return [state.leave(recipe.chunk)] if levels[-1] == len(sigmas) - 2 else []

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

    def encode_still(self, picture: Tensor) -> Tensor:
        """A picture [3, H, W] as a first frame [C, 1, h, w]."""
        if self._still is None:
            self._still = self._encoder.begin(*self.size)
        self._still.reset()
        return self._encoder.encode(picture[None, None].to(self.arena.device), self._still)[0].float()

    def forget(self, state: VideoState) -> None:
        for row in state.rows:
            self.arena.cache.reset(row)

    def decode(self, state: VideoState, latents: Tensor) -> Tensor:
        """Pictures [T, 3, H, W] in [0, 1] of the next finished frames [C, n, h, w]."""
        if state.still is not None:
            latents, state.still = torch.cat([state.still, latents], dim=1), None
        pictures = self._decoder.decode(latents[None], state.decoding)[0].float()
        if self.recipe.overlap:
            back = PICTURES_PER_LATENT * (self.recipe.overlap - 1) + 1
            state.corner = pictures[-back].clone()
        return pictures

    def _write(self, state: VideoState, latents: Tensor, chunk: KVChunk) -> None:
        """Let the rows of `chunk` remember finished frames."""
        sigma = self.recipe.context_timestep / 1000
        if sigma > 0:
            latents = add_noise(latents, self._noise(state, state.frame, latents.shape[2], CONTEXT_NOISE), sigma)
        self._flow(latents, self._told(sigma), chunk)
        chunk.commit()

    def _flow(self, latents: Tensor, timestep: Tensor, chunk: KVChunk) -> Tensor:
        """What the network predicts, float32; `timestep` [B, 1] or [B, F]."""
        (flow,) = self.transformer(
            latents.to(self.arena.dtype),
            timestep,
            text_keys=self.arena.prompts(chunk.rows),
            cache=chunk,
            return_dict=False,
        )
        return flow.float()

    def _told(self, sigma: float) -> Tensor:
        return torch.full((1, 1), 1000 * sigma, device=self.arena.device)

    def _levels(self, sigmas: Sequence[float]) -> Tensor:
        """[1, n]."""
        return torch.tensor([sigmas], device=self.arena.device, dtype=torch.float32)

    def _noise(self, state: VideoState, frame: int, count: int, step: int) -> Tensor:
        """[1, C, count, h, w]: each frame's noise is its own, whatever it is drawn together with."""
        frames = torch.arange(frame, frame + count, device=self.arena.device)
        return philox_normal(torch.full_like(frames, state.seed), frames, step, self.latent_size).transpose(0, 1)[None]
