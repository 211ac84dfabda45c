"""Text spoken by any of the generators: durations come from the speaking model, sound from its codec."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ..models.frame_tokens import FrameTokenTransformer
from ..models.masked_sound import MaskedSoundTransformer
from ..models.transformer import CausalTransformer3DModel
from ..samplers import Categorical, FlowSampler
from .sound_frames import FrameStream
from .sound_infill import Infill
from .sound_text import as_actions, text_tokens
from .sound_tokens import draw_codes
from .speech_draw import SpeechParts

Generator = MaskedSoundTransformer | FrameTokenTransformer | CausalTransformer3DModel
KINDS = {kind.__name__: kind for kind in (MaskedSoundTransformer, FrameTokenTransformer, CausalTransformer3DModel)}


def load_generator(folder: str | Path) -> Generator:
    """What `millstream train sound-tokens` or `sound-infill` wrote, float32.

    Raises:
        ValueError: no folder of a generator.
    """
    file = Path(folder) / "config.json"
    name = json.loads(file.read_text(encoding="utf-8")).get("_class_name") if file.is_file() else None
    if name not in KINDS:
        raise ValueError(f"{folder} must be the folder of one of {', '.join(KINDS)}, got {name or 'no config.json'}")
    return KINDS[name].from_pretrained(folder, torch_dtype=torch.float32).eval()


@torch.no_grad()
def speak_with(
    parts: SpeechParts, model: Generator, text: str, voice: str, *, seed: int = 0, temperature: float = 0.8
) -> Tensor:
    """The waveform [S] of a text.

    Args:
        parts: of a speaking model, whose codec's codes or latents `model` draws.
        model: as `load_generator` gives it.
        temperature: of codes; latents are drawn with guidance instead.
    """
    told = text_tokens(parts, text, voice)
    seeds, frames = torch.tensor([seed], device=told.device), told.shape[1]
    if isinstance(model, CausalTransformer3DModel):
        actions = as_actions(told)
        pair = torch.cat([actions, torch.zeros_like(actions)])
        fill = Infill(model, FlowSampler(8), actions=pair, guidance_scale=1.5)
        blank = told.new_zeros(1, parts.codec.latent_channels, frames, dtype=torch.float32)
        latents = fill.whole(blank, told.new_zeros(1, frames, dtype=torch.bool), seeds)
        return parts.codec.decode(latents)[0, 0]
    if isinstance(model, MaskedSoundTransformer):
        codes = draw_codes(model, frames, seeds, condition=told, temperature=temperature)
    else:
        count = 1 + model.config["chained"]
        stream = FrameStream(model, count, Categorical(temperature))
        state = stream.begin(seeds)
        # Passes are whole: what the last one says beyond the text is cut off.
        padded = torch.cat([told, told[:, -1:].expand(-1, -frames % count, -1)], dim=1)
        codes = torch.cat([stream.step(state, part) for part in padded.split(count, dim=1)], dim=2)[..., :frames]
    return parts.codec.decode(parts.codec.dequantize(codes))[0, 0]
