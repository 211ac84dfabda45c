"""The network at work on the rows of a video pipeline: passes over a chunk, decoding, and how both are recorded.

Every kind of step (drawing a chunk, remembering it, decoding it; at each fill of the window) is a function of tensors
that reads nothing on the host, so on a GPU it becomes a CUDA graph (`streaming.graphs`). Latents are [B, C, F, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from ..kernels import philox_normal
from ..models.mixers import make_cache
from ..models.stream_codec import PICTURES_PER_LATENT, CodecState
from ..models.tiny_vae import TinyVideoDecoder
from ..models.transformer import CausalTransformer3DModel, Condition
from ..models.wan_vae import AutoencoderKLWan, WanDecoder, WanEncoder
from ..samplers import add_noise
from ..streaming.kv_cache import KVCache, KVChunk
from .presets import Preset, kv_storage
from .recipes import Recipe
from .rows import RowArena
from .video_actions import GameReader
from .video_state import VideoState

CONTEXT_NOISE = 1 << 20  # the noise step of the pass that remembers; sampler steps count from 0
RECORDINGS = 64  # steps that are kept: drawing and remembering, at every fill of a window of 21 frames and every turn


class VideoPasses(GameReader):
    """The part of a video pipeline that runs the network."""

    transformer: CausalTransformer3DModel
    vae: AutoencoderKLWan
    decoder: TinyVideoDecoder | None
    recipe: Recipe
    preset: Preset
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
            self._arena = RowArena(self._make_cache, self.transformer, limit=RECORDINGS)
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

    @property
    def encoder(self) -> WanEncoder:
        """What encodes pictures that come in."""
        return self._encoder

    def _make_cache(self, rows: int) -> KVCache:
        return make_cache(self.transformer, **self.cache_shape(rows))

    def cache_shape(self, rows: int) -> dict[str, Any]:
        """Arguments of a `KVCache` with so many rows for pictures of the present size."""
        config, recipe = self.transformer.config, self.recipe
        _, patch_h, patch_w = config["patch_size"]
        _, height, width = self.latent_size
        tokens = (height // patch_h) * (width // patch_w)
        return {
            "layers": config["num_layers"],
            "rows": rows,
            "heads": config["num_attention_heads"],
            "head_dim": config["attention_head_dim"],
            "tokens_per_frame": tokens,
            "window": recipe.memory,
            "position": recipe.position,
            "spare": recipe.spare,
            "storage": kv_storage(
                self.preset, self.transformer, recipe.memory.frames * tokens, masked=recipe.spare > 0
            ),
        }

    def _run(self, kind: Hashable, step: Callable[..., Any], chunk: KVChunk, inputs: Sequence[Tensor]) -> Any:
        """`step(chunk, *inputs)`, replayed where it is recorded; `kind` is all that it depends on besides them.

        Recorded steps are given a twin of `chunk`: what they compute must lie in the recording.
        """
        recordings = self.arena.recordings
        if not recordings.records or not chunk.rows.neighbours:
            return step(chunk, *(value.to(self.arena.device, non_blocking=True) for value in inputs))
        return recordings.run((kind, chunk.layout), lambda *inputs: step(chunk.twin(), *inputs), inputs)

    def _write(self, state: VideoState, latents: Tensor, chunk: KVChunk) -> None:
        """Let the rows of `chunk` remember finished frames."""
        sigma = self.recipe.context_timestep / 1000

        def written(chunk: KVChunk, numbers: Tensor, latents: Tensor, *given: Tensor) -> None:
            self.taken(chunk, given)
            if sigma > 0:
                latents = add_noise(latents, self._noise_of(numbers, latents.shape[2], CONTEXT_NOISE), sigma)
            latents, more = self.beside(latents, chunk)
            self.transformer.remember(
                latents.to(self.arena.dtype),
                self._condition(sigma, chunk),
                text_keys=self.arena.prompts(chunk.rows),
                cache=chunk,
                **more,
            )
            chunk.advance()

        heard = self.heard(state, state.shot, latents.shape[2])
        self._run(("write", sigma), written, chunk, [numbers(state), latents, *heard])
        chunk.count()

    def _condition(self, sigma: float, chunk: KVChunk) -> Condition:
        """What a level makes of a pass over `chunk`; see `_prepare`."""
        if sigma not in chunk.memo:
            self._prepare([sigma], chunk)
        return chunk.memo[sigma]

    def _prepare(self, sigmas: Sequence[float], chunk: KVChunk) -> None:
        """Compute at once what the passes at these levels are conditioned on."""
        chunk.memo.update(zip(sigmas, self.transformer.conditions([1000 * sigma for sigma in sigmas], None)))

    def _flow(self, latents: Tensor, timestep: Tensor | Condition, chunk: KVChunk) -> Tensor:
        """What the network predicts, float32; `timestep` [B, 1] or [B, F]."""
        latents, more = self.beside(latents, chunk)
        (flow,) = self.transformer(
            latents.to(self.arena.dtype),
            timestep,
            text_keys=self.arena.prompts(chunk.rows),
            cache=chunk,
            return_dict=False,
            **more,
        )
        return flow.float()

    def _noise(self, state: VideoState, frame: int, count: int, step: int) -> Tensor:
        """[1, C, count, h, w]: each frame's noise is its own, whatever it is drawn together with."""
        return self._noise_of(numbers(state, frame).to(self.arena.device, non_blocking=True), count, step)

    def _noise_of(self, numbers: Tensor, count: int, step: int, offset: int = 0) -> Tensor:
        """The same for `count` frames from `offset` behind the one that `numbers` [2, 1] name."""
        seed, frame = numbers.unbind()
        frames = frame + torch.arange(offset, offset + count, device=frame.device)
        return philox_normal(seed.expand(count).contiguous(), frames, step, self.latent_size).transpose(0, 1)[None]

    def encode_still(self, picture: Tensor) -> Tensor:
        """A picture [3, H, W] as a first frame [C, 1, h, w]."""
        if self._still is None:
            self._still = self._encoder.begin(*self.size)
        self._still.reset()
        return self._encoder.encode(picture[None, None].to(self.arena.device), self._still)[0].float()

    def decode(self, state: VideoState, latents: Tensor) -> Tensor:
        """Pictures [T, 3, H, W] in [0, 1] of the next finished frames [C, n, h, w]."""
        if state.still is not None:
            latents, state.still = torch.cat([state.still, latents], dim=1), None
        codec, before = state.decoding, state.decoding.frames

        def decoded(latents: Tensor) -> Tensor:
            codec.frames = before  # which the host counts, and recording runs this once more
            return self._decoder.decode(latents[None], codec)[0].float()

        kind = ("decode", state.rows[0], before == 0)
        pictures = self.arena.decodings.run(kind, decoded, [latents])
        assert pictures is not None, "decoding gives pictures"
        codec.frames = before + latents.shape[1]
        if self.recipe.overlap:
            back = PICTURES_PER_LATENT * (self.recipe.overlap - 1) + 1
            state.corner = pictures[-back].clone()
        return pictures


def numbers(state: VideoState, frame: int | None = None) -> Tensor:
    """Which frame of which stream: int64 [2, 1] on the host, the seed and the next frame's number."""
    return torch.tensor([[state.seed], [state.frame if frame is None else frame]])
