"""Sound filled in by flow matching: what is known of a clip is kept, the rest is drawn to fit it and the text.

One causal transformer on a grid of one token per frame, and a mask that is switched: `Infill.whole` lets every frame
see every other one, which fits a gap to both its sides; `Infill.blocks` lets a block see itself and what came before,
so that a voice goes on from a prompt clip as a stream, in fixed memory. Known frames stand at noise level 0 among
frames at the sampler's level, so a prompt, a gap and a whole clip are the same thing.

Source: UniVoice (arXiv:2510.04593) for flow matching and a mask that is switched in one model; Voicebox
(arXiv:2306.15687) for infilling. Shapes: B batch, C latent channels, T frames, S text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..kernels import philox_normal
from ..models.transformer import CausalTransformer3DModel
from ..samplers import FlowSampler, combine, integrate
from ..streaming.kv_cache import KVCache, KVChunk, Window


class Infill:
    """Fills clips of latents in.

    Args:
        model: with patch_size (1, 1, 1) and as many channels out as in.
        sampler: steps and rule.
        text: [B, S, text_dim], or None for a model without cross-attention.
        actions: [B, T, action_dim], what each frame is told (its phonemes), or None.
        guidance_scale: other than 1, `text` and `actions` are [2 B, ...], the wanted half first.

    Raises:
        ValueError: a model that does not work on frames of latents.
    """

    def __init__(
        self,
        model: CausalTransformer3DModel,
        sampler: FlowSampler,
        *,
        text: Tensor | None = None,
        actions: Tensor | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        config = model.config
        if tuple(config["patch_size"]) != (1, 1, 1) or config["out_channels"] not in (None, config["in_channels"]):
            raise ValueError(
                "infilling needs a model with patch_size (1, 1, 1) and out_channels as in_channels, "
                f"got {tuple(config['patch_size'])}, {config['in_channels']} in and {config['out_channels']} out"
            )
        self.model, self.sampler, self.actions, self.scale = model, sampler, actions, guidance_scale
        with torch.no_grad():
            self.text_keys = [()] * config["num_layers"] if text is None else model.embed_text(text)

    @torch.no_grad()
    def whole(self, latents: Tensor, known: Tensor, seeds: Tensor) -> Tensor:
        """Every frame sees every other one: [B, C, T].

        Args:
            latents: [B, C, T], of meaning where `known`.
            known: bool [B, T]; those frames are kept.
            seeds: int64 [B]; a frame's noise depends on its clip's seed and its place alone.
        """
        return self._draw(latents, known, seeds, 0, None)

    @torch.no_grad()
    def blocks(self, latents: Tensor, known: Tensor, seeds: Tensor, window: Window) -> Iterator[Tensor]:
        """Block after block of `window.block` frames, each seeing itself and the past.

        The last may be shorter; then it looks back as many frames more.

        Args: as in `whole`; a prompt is what is known at the start.

        Yields:
            [B, C, n] of every block, known ones included.
        """
        cache = self._cache(self._times * len(seeds), window)
        for first in range(0, latents.shape[2], window.block):
            part = latents[:, :, first : first + window.block]
            given = known[:, first : first + window.block]
            chunk = cache.open(range(cache.rows), part.shape[2])
            drawn = self._draw(part, given, seeds, first, chunk)
            # The block as it now is becomes the context of the next one.
            self._velocity(drawn, torch.ones_like(given), 0.0, first, chunk)
            chunk.commit()
            yield drawn

    @property
    def _times(self) -> int:
        return 1 if self.scale == 1 else 2

    def _cache(self, rows: int, window: Window) -> KVCache:
        config, weight = self.model.config, self.model.proj_out.weight
        return KVCache(
            layers=config["num_layers"],
            rows=rows,
            heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            tokens_per_frame=1,
            window=window,
            device=weight.device,
            dtype=weight.dtype,
        )

    def _draw(self, latents: Tensor, known: Tensor, seeds: Tensor, first: int, chunk: KVChunk | None) -> Tensor:
        """Frames from `first` on, known ones as they are."""
        kept, noise = known[:, None], self._noise(latents, seeds, first)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            return self._velocity(torch.where(kept, latents, x), known, sigma, first, chunk)

        sigmas, rule = self.sampler.sigmas(), self.sampler.rule
        drawn = integrate(velocity, noise(-1), sigmas, rule, noise=noise)
        return torch.where(kept, latents, drawn)

    def _noise(self, latents: Tensor, seeds: Tensor, first: int) -> Callable[[int], Tensor]:
        batch, channels, count = latents.shape
        frames = torch.arange(first, first + count, device=seeds.device).repeat(batch)
        rows = seeds.repeat_interleave(count)

        def noise(step: int) -> Tensor:
            drawn = philox_normal(rows, frames, step + 1, (channels,))
            return drawn.unflatten(0, (batch, count)).transpose(1, 2).to(latents)

        return noise

    def _velocity(self, x: Tensor, known: Tensor, sigma: float, first: int, chunk: KVChunk | None) -> Tensor:
        levels = torch.where(known, 0.0, float(self.sampler.timestep(sigma))).repeat(self._times, 1)
        actions = None if self.actions is None else self.actions[:, first : first + x.shape[2]]
        frames = x.repeat(self._times, 1, 1)[..., None, None]
        out = self.model(frames, levels, text_keys=self.text_keys, actions=actions, cache=chunk, return_dict=False)[0][
            ..., 0, 0
        ]
        if self._times == 1:
            return out
        wanted, unwanted = out.chunk(2)
        return combine(wanted, unwanted, self.scale)
