"""How a world draws one frame: denoise, remember, decode.

Cut from `WorldPipeline`, which decides what is drawn for whom; here is only the network at work on the arena's rows.
Latents are [B, C, 1, h, w], one frame for each of B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from threading import RLock
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from ..kernels import philox_normal
from ..models.frame_codec import FrameAutoencoder
from ..models.mixers import make_cache
from ..models.text_encoder import ByteTextEncoder
from ..models.transformer import CausalTransformer3DModel, TextKeys
from ..samplers import FlowSampler
from ..samplers.flow_sampler import integrate
from ..samplers.guidance import combine
from ..streaming import WorldControl
from ..streaming.kv_cache import KVCache, KVChunk, Window
from .presets import Preset, attend_at, kept_attention, kv_storage
from .rows import RowArena
from .world_state import WorldState

COMMIT_NOISE = 1 << 20  # the noise step of the pass that writes the cache; sampler steps count from 0


class FrameDrawer(DiffusionPipeline):
    """The part of a world pipeline that runs the network. `size` is (height, width) in pixels."""

    transformer: CausalTransformer3DModel
    codec: FrameAutoencoder
    text_encoder: ByteTextEncoder
    scheduler: FlowSampler
    size: tuple[int, int]
    window: Window
    preset: Preset
    _arena: RowArena | None
    _sharing: RLock

    @property
    def arena(self) -> RowArena:
        """Memory of the running streams."""
        if self._arena is None:
            self.codec.lay_out_weights()
            self._arena = RowArena(self._make_cache, self.transformer)
        return self._arena

    def _take_row(self) -> int:
        """A fresh row; the arena follows the weights to another device while nothing runs."""
        model = self.transformer
        if not self.arena.in_use and (self.arena.device, self.arena.dtype) != (model.device, model.dtype):
            self._arena = None
        self.arena.recordings.follow([*self.transformer.parameters(), *self.codec.parameters()])
        return self.arena.take()

    def _make_cache(self, rows: int) -> KVCache:
        tokens = self.size[0] * self.size[1] // 256
        storage = kv_storage(self.preset, self.transformer, self.window.frames * tokens)
        return make_cache(self.transformer, rows=rows, tokens_per_frame=tokens, window=self.window, storage=storage)

    def draw(self, states: Sequence[WorldState], chunk: KVChunk, actions: Tensor, control: WorldControl) -> Tensor:
        """Denoise the next frame of every state: latents [B, C, 1, h, w]."""
        sigmas, rule = self.scheduler.sigmas(control.num_inference_steps), self.scheduler.rule
        silence = self._silence(len(states)) if control.guidance_scale != 1 else None

        def drawn(chunk: KVChunk, numbers: Tensor, actions: Tensor, weight: Tensor) -> Tensor:
            text = self.arena.prompts(chunk.rows)
            self._prepare(chunk, sigmas[:-1], actions)
            kept, kept_silent = (kept_attention(self.preset, self.arena.cache) for _ in range(2))

            def denoise(latents: Tensor, sigma: float) -> Tensor:
                step, steps = sigmas.index(sigma), len(sigmas) - 1
                attend_at(step, steps, self.preset, chunk, kept)
                flow = self._flow(latents, sigma, text, chunk, actions)
                if silence is None:
                    return flow
                attend_at(step, steps, self.preset, chunk, kept_silent)
                return combine(flow, self._flow(latents, sigma, silence, chunk, actions), weight)

            def noise(step: int) -> Tensor:
                return self._noise_of(numbers, step)

            drawn = integrate(denoise, noise(0), sigmas, rule, noise=lambda step: noise(step + 1))
            chunk.reuse = None
            return drawn

        kind = ("draw", tuple(sigmas), rule, silence is not None)
        weight = torch.full((1,) * 5, control.guidance_scale)
        return self._run(kind, drawn, chunk, [_numbers(states), actions, weight])

    def remember(self, states: Sequence[WorldState], latents: Tensor, chunk: KVChunk, actions: Tensor) -> None:
        """Write the finished frame into the cache, a little noised, as in training."""
        sigma = self.scheduler.config["context_sigma"]

        def remembered(chunk: KVChunk, numbers: Tensor, latents: Tensor, actions: Tensor) -> None:
            noisy = self.scheduler.add_noise(latents, self._noise_of(numbers, COMMIT_NOISE), sigma)
            self.transformer.remember(
                noisy.to(self.arena.dtype),
                self.transformer.conditions([float(self.scheduler.timestep(sigma))], actions)[0],
                text_keys=self.arena.prompts(chunk.rows),
                cache=chunk,
            )
            chunk.advance()

        self._run(("remember", sigma), remembered, chunk, [_numbers(states), latents, actions])
        chunk.count()

    def encode(self, pictures: Sequence[Tensor]) -> Tensor:
        """Pictures [3, H, W] in [0, 1] to latents [B, C, 1, h, w]."""
        together = torch.stack([picture.to(self.arena.device, self.arena.dtype) for picture in pictures])
        return self.codec.encode(together[:, None])

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, 1, h, w] to frames [B, 1, 3, H, W] in [0, 1], float32."""

        def decoded(latents: Tensor) -> Tensor:
            return self.codec.decode(latents.to(self.arena.dtype)).float()

        frames = self.arena.recordings.run(("decode",), decoded, [latents])
        assert frames is not None, "decoding gives frames"
        return frames

    @torch.no_grad()
    def warmup(self, sessions: int = 1, *, num_inference_steps: int | None = None, guidance_scale: float = 1.0) -> None:
        """Draw a few frames for nobody, under a progress bar, so that no later frame waits.

        Kernels are then compiled, and on a GPU every step is recorded as a CUDA graph. Without it that happens during
        the first frames of a stream: they come slowly, and a few of them late.

        Args:
            sessions: how many will be stepped together.
            num_inference_steps, guidance_scale: what they will be drawn with; see `WorldControl`. The scale matters
                only by being 1 or not.

        Raises:
            ValueError: fewer than one session, or a number of steps that the sampler does not know.
        """
        if sessions < 1:
            raise ValueError(f"sessions must be at least 1, got {sessions}")
        control = WorldControl("warm-up", num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        with self._sharing:
            states = [WorldState(self._take_row(), seed=0) for _ in range(sessions)]
            arena = self.arena
            try:
                for state in states:
                    self._read_prompt(state, control.prompt)
                actions = torch.zeros(sessions, 1, self.transformer.config["action_dim"]).to(arena.device, arena.dtype)
                count = self.window.frames + arena.recordings.patience if arena.recordings.records else 2
                pipe: Any = self  # accelerate's wrapper of progress_bar hides its signature from type checkers
                for _ in pipe.progress_bar(range(count)):
                    chunk = arena.cache.open([state.row for state in states])
                    latents = self.draw(states, chunk, actions, control)
                    self.remember(states, latents, chunk, actions)
                    self.decode(latents)
            finally:
                for state in states:
                    arena.give_back(state.row)

    def _run(self, kind: tuple[Hashable, ...], step: Callable[..., Any], chunk: KVChunk, inputs: list[Tensor]) -> Any:
        """`step(chunk, *inputs)`; where steps are recorded, with a chunk that serves all frames of its kind."""
        recordings, rows = self.arena.recordings, chunk.rows
        if not recordings.records:
            return step(chunk, *(value.to(self.arena.device) for value in inputs))
        if rows.neighbours:

            def alone(*inputs: Tensor) -> Any:
                return step(chunk.for_recording(), *inputs)

            return recordings.run((*kind, chunk.fill, *rows.host), alone, inputs)

        def anywhere(index: Tensor, *inputs: Tensor) -> Any:
            return step(chunk.for_recording(index), *inputs)

        return recordings.run((*kind, chunk.fill, "anywhere"), anywhere, [torch.tensor(rows.host), *inputs])

    def _prepare(self, chunk: KVChunk, sigmas: Sequence[float], actions: Tensor) -> None:
        """Compute at once what the passes at these levels over `chunk` are conditioned on."""
        levels = list(dict.fromkeys(sigmas))
        timesteps = [float(self.scheduler.timestep(level)) for level in levels]
        chunk.memo.update(zip(levels, self.transformer.conditions(timesteps, actions)))

    def _flow(self, latents: Tensor, sigma: float, text: TextKeys, chunk: KVChunk, actions: Tensor) -> Tensor:
        if sigma not in chunk.memo:
            self._prepare(chunk, [sigma], actions)
        (flow,) = self.transformer(
            latents.to(self.arena.dtype), chunk.memo[sigma], text_keys=text, cache=chunk, return_dict=False
        )
        return flow.float()

    def _noise(self, states: Sequence[WorldState], step: int) -> Tensor:
        return self._noise_of(_numbers(states).to(self.arena.device, non_blocking=True), step)

    def _noise_of(self, numbers: Tensor, step: int) -> Tensor:
        """Noise [B, C, 1, h, w] of draw `step` for the frames that `_numbers` names."""
        shape = (self.codec.config["latent_channels"], 1, self.size[0] // 8, self.size[1] // 8)
        seed, frame = numbers.unbind()
        return philox_normal(seed, frame, step, shape)

    def _read_prompt(self, state: WorldState, prompt: str) -> None:
        self.arena.read_prompt(state.row, self.text_encoder.encode([prompt]).to(self.arena.dtype))
        state.prompt = prompt

    def _silence(self, count: int) -> TextKeys:
        """Keys of the empty prompt for `count` rows."""
        arena = self.arena
        if arena.silence is None:
            arena.silence = self.transformer.embed_text(self.text_encoder.encode([""]).to(arena.dtype))
        return [tuple(part.expand(count, -1, -1, -1) for part in layer) for layer in arena.silence]


def _numbers(states: Sequence[WorldState]) -> Tensor:
    """Which frame of which stream: int64 [2, B] on the host, seeds and frame numbers."""
    return torch.tensor([[state.seed for state in states], [state.frame for state in states]])
