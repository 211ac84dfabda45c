"""How a world draws one frame: denoise, remember, decode.

Cut from `WorldPipeline`, which decides what is drawn for whom; here is only the network at work on the arena's rows.
Latents are [B, C, 1, h, w], one frame for each of B rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from ..kernels import philox_normal
from ..models.frame_codec import FrameAutoencoder
from ..models.text_encoder import ByteTextEncoder
from ..models.transformer import CausalTransformer3DModel, TextKeys
from ..samplers import FlowSampler
from ..samplers.flow_sampler import integrate
from ..samplers.guidance import combine
from ..streaming import WorldControl
from ..streaming.kv_cache import KVCache, KVChunk, Window
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
    _arena: RowArena | None

    @property
    def arena(self) -> RowArena:
        """Memory of the running streams."""
        if self._arena is None:
            self._arena = RowArena(self._make_cache, self.transformer)
        return self._arena

    def _take_row(self) -> int:
        """A fresh row; the arena follows the weights to another device while nothing runs."""
        model = self.transformer
        if not self.arena.in_use and (self.arena.device, self.arena.dtype) != (model.device, model.dtype):
            self._arena = None
        return self.arena.take()

    def _make_cache(self, rows: int) -> KVCache:
        model, config = self.transformer, self.transformer.config
        return KVCache(
            layers=config["num_layers"],
            rows=rows,
            heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            tokens_per_frame=self.size[0] * self.size[1] // 256,
            window=self.window,
            device=model.device,
            dtype=model.dtype,
        )

    def draw(self, states: Sequence[WorldState], chunk: KVChunk, actions: Tensor, control: WorldControl) -> Tensor:
        """Denoise the next frame of every state: latents [B, C, 1, h, w]."""
        text = self.arena.prompts(chunk.rows)
        silence = self._silence(len(states)) if control.guidance_scale != 1 else None

        def denoise(latents: Tensor, sigma: float) -> Tensor:
            flow = self._flow(latents, sigma, text, chunk, actions)
            if silence is None:
                return flow
            return combine(flow, self._flow(latents, sigma, silence, chunk, actions), control.guidance_scale)

        sigmas = self.scheduler.sigmas(control.num_inference_steps)
        return integrate(
            denoise,
            self._noise(states, 0),
            sigmas,
            self.scheduler.rule,
            noise=lambda step: self._noise(states, step + 1),
        )

    def remember(self, states: Sequence[WorldState], latents: Tensor, chunk: KVChunk, actions: Tensor) -> None:
        """Write the finished frame into the cache, a little noised, as in training."""
        sigma = self.scheduler.config["context_sigma"]
        noisy = self.scheduler.add_noise(latents, self._noise(states, COMMIT_NOISE), sigma)
        self._flow(noisy, sigma, self.arena.prompts(chunk.rows), chunk, actions)
        chunk.commit()

    def encode(self, pictures: Sequence[Tensor]) -> Tensor:
        """Pictures [3, H, W] in [0, 1] to latents [B, C, 1, h, w]."""
        together = torch.stack([picture.to(self.arena.device, self.arena.dtype) for picture in pictures])
        return self.codec.encode(together[:, None])

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, 1, h, w] to frames [B, 1, 3, H, W] in [0, 1], float32."""
        return self.codec.decode(latents.to(self.arena.dtype)).float()

    def _flow(self, latents: Tensor, sigma: float, text: TextKeys, chunk: KVChunk, actions: Tensor) -> Tensor:
        level = torch.full((latents.shape[0], 1), sigma, device=latents.device)
        timestep = self.scheduler.timestep(level)
        (flow,) = self.transformer(
            latents.to(self.arena.dtype),
            timestep,
            actions=actions,
            text_keys=text,
            cache=chunk,
            return_dict=False,
        )
        return flow.float()

    def _noise(self, states: Sequence[WorldState], step: int) -> Tensor:
        shape = (self.codec.config["latent_channels"], 1, self.size[0] // 8, self.size[1] // 8)
        seed, frame = torch.tensor([[state.seed, state.frame] for state in states], device=self.arena.device).unbind(1)
        return philox_normal(seed, frame, step, shape)

    def _read_prompt(self, state: WorldState, prompt: str) -> None:
        self.arena.read_prompt(state.row, self.text_encoder.encode([prompt]).to(self.arena.dtype))
        state.prompt = prompt

    def _silence(self, count: int) -> TextKeys:
        tokens = self.text_encoder.encode([""]).to(self.arena.dtype)
        return self.transformer.embed_text(tokens.expand(count, -1, -1))
