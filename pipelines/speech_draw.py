"""How a speaking model draws: from text to the plan of what sounds when, and from the plan to frames of latents.

Shapes: R rows, C latent channels, D what the backbone says about a frame.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.noise import philox_normal
from ..models.audio_codec import AudioCodec
from ..models.pronouncer import Pronouncer
from ..models.speech import SpeechTransformer, make_plan
from ..samplers import FlowSampler, add_noise, integrate

PAST_NOISE, FIRST_NOISE = 0, 1  # which draw of a frame is which; the sampler's own steps follow


class SpeechParts(NamedTuple):
    """The models that speak together."""

    transformer: SpeechTransformer
    codec: AudioCodec
    pronouncer: Pronouncer
    scheduler: FlowSampler


def whole_slots(durations: Tensor, slots: int) -> Tensor:
    """Durations [B, P] as whole slots that keep the pace: rounding is carried on. The end is filled to a frame."""
    ends = durations.cumsum(dim=1).round()
    ends[:, -1] = (ends[:, -1] / slots).ceil() * slots
    return ends.diff(dim=1, prepend=ends.new_zeros(len(ends), 1))


def draw_latents(
    parts: SpeechParts,
    said: Tensor,
    seeds: Tensor,
    frames: Tensor,
    *,
    steps: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The latents [R, C] of a frame.

    Args:
        said: [R, D], from `SpeechTransformer.next_frames`.
        seeds, frames: int64 [R], of the streams, and the number of the frame in each.
        steps: of the sampler; its own by default.
        temperature: deviation of the noise that it starts from; below 1 is steadier.
    """
    channels, rule = parts.transformer.config["latent_channels"], parts.scheduler.rule

    def noise(step: int) -> Tensor:
        return philox_normal(seeds, frames, FIRST_NOISE + 1 + step, (channels,)).to(said)

    first = temperature * philox_normal(seeds, frames, FIRST_NOISE, (channels,)).to(said)
    sigmas = parts.scheduler.sigmas(steps)
    return integrate(lambda x, sigma: parts.transformer.head(x, sigma, said), first, sigmas, rule, noise=noise)


def noised_past(parts: SpeechParts, latents: Tensor, seeds: Tensor, frames: Tensor) -> Tensor:
    """The frame before [R, C] as it is shown to the model that draws frame number `frames` [R]."""
    noise = philox_normal(seeds, frames, PAST_NOISE, tuple(latents.shape[1:])).to(latents)
    return add_noise(latents, noise, parts.scheduler.config["context_sigma"])


@torch.no_grad()
def speak(
    parts: SpeechParts,
    text: str,
    voice: str,
    *,
    seed: int = 0,
    speed: float = 1.0,
    steps: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The waveform [S] of a whole text in one voice, at the codec's rate: the stream of one row, drained."""
    model, device = parts.transformer, parts.transformer.device
    tokens = parts.pronouncer.phonemes(text)[None].to(device)
    number = torch.tensor([model.voice_number(voice)], device=device)
    encoded = model.encode_phonemes(tokens, number)
    durations = whole_slots(model.durations(encoded, speed), model.slots)
    count = round(float(durations.sum()) / model.slots)
    actions = model.frame_actions(encoded, make_plan(durations, 0, count, model.slots), number)
    cache, state = model.make_cache(), parts.codec.begin()
    seeds = torch.tensor([seed], device=device)
    latents, sound = encoded.new_zeros(1, model.config["latent_channels"]), []
    for frame in range(count):
        frames = torch.tensor([frame], device=device)
        past = noised_past(parts, latents, seeds, frames)
        said = model.next_frames(past, actions[:, frame], cache, [0], parts.scheduler.config["context_sigma"])
        latents = draw_latents(parts, said, seeds, frames, steps=steps, temperature=temperature)
        sound.append(parts.codec.decode_step(latents[..., None], state))
    return torch.cat(sound, dim=-1)[0, 0]
