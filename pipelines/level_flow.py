"""Flow over causally ordered noise levels: each step of a denoising sees the steps before it (ARFlow).

A picture on its way from noise to data is a sequence, one entry per noise level, the noisiest first. A causal
transformer reads it as it reads the frames of a video: whole within an entry, and of earlier entries what its layers
remember. With linear mixers (`CausalTransformer3DModel(mixer="linear(gated)")`) that is a state of fixed size, carried
from step to step, so a step costs the same however many there were.

Source: ARFlow, Hui et al. 2025 (arXiv:2501.16085). Its sequences in training are several pictures of one class, each at
a level of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..models.mixers import make_cache
from ..models.transformer import CausalTransformer3DModel
from ..samplers.flow import add_noise
from ..samplers.rules import Euler
from ..streaming.kv_cache import Window


def level_sequence(latents: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What training needs of several pictures that belong together, in an order that is causal.

    Args:
        latents: clean, [B, C, K, H, W]: K pictures of one class in each row.

    Returns:
        The sequence [B, C, K, H, W], noisier entries first; its sigmas [B, K]; and the velocities wanted of it.
    """
    shape = (latents.shape[0], latents.shape[2])
    sigmas = torch.rand(shape, generator=generator, device=latents.device).sort(dim=1, descending=True).values
    noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    return add_noise(latents, noise, sigmas[:, None, :, None, None]), sigmas, noise - latents


def level_loss(
    transformer: CausalTransformer3DModel, latents: Tensor, text: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Flow matching over such a sequence in one pass, each entry seeing those before it.

    Args:
        latents: as `level_sequence` takes them.
        text: the prompt (or class) of each row, as `embed_text` takes it.
    """
    sequence, sigmas, wanted = level_sequence(latents, generator)
    found = transformer(sequence, 1000 * sigmas, text, window=Window(latents.shape[2])).sample
    return (found.float() - wanted.float()).square().mean()


@torch.no_grad()
def level_steps(
    transformer: CausalTransformer3DModel, noise: Tensor, text: Tensor, sigmas: Sequence[float], *, remembered: int = 1
) -> Iterator[Tensor]:
    """Denoise, every step with the memory of the ones before it; yields the latents [B, C, H, W] after each.

    Args:
        noise: [B, C, H, W], at level `sigmas[0]`.
        sigmas: levels, falling; the last is where it ends, mostly 0.
        remembered: earlier steps that softmax layers see, where there are some; linear layers remember all.

    Raises:
        ValueError: fewer than two levels, or levels that do not fall.
    """
    if len(sigmas) < 2 or any(after >= before for before, after in pairwise(sigmas)):
        raise ValueError(f"sigmas must fall, from the noise to the end, got {list(sigmas)}")
    rows, latents, rule = list(range(len(noise))), noise, Euler()
    _, tokens_high, tokens_wide = transformer.grid(noise[:, :, None])
    cache = make_cache(
        transformer, rows=len(rows), tokens_per_frame=tokens_high * tokens_wide, window=Window(remembered + 1)
    )
    keys = transformer.embed_text(text)
    for sigma, after in pairwise(sigmas):
        chunk = cache.open(rows)
        level = torch.full((len(rows), 1), 1000 * sigma, device=noise.device)
        velocity = transformer(latents[:, :, None], level, text_keys=keys, cache=chunk).sample[:, :, 0]
        chunk.commit()  # noisy as it was: that is what later steps see
        latents, _ = rule.step(latents, velocity, sigma, after)
        yield latents
