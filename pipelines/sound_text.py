"""What is to be said, as conditioning tokens of the generators over residual codes: a few phonemes per frame, a voice.

Each token of a frame has ids of its own, so that a model may add their embeddings up. Shapes: B batch, P phonemes, T
frames, N slots per frame (`SpeechPlan`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.phonemes import TOKENS
from ..models.speech import make_plan
from .speech_draw import SpeechParts, whole_slots

READ = 4  # phonemes that a frame is told, evenly spread over it
VOICES = 16
IDS = READ * TOKENS + VOICES


def frame_tokens(tokens: Tensor, phoneme: Tensor, voice: Tensor) -> Tensor:
    """Conditioning tokens int64 [B, T, READ + 1].

    Args:
        tokens: int64 [B, P] (`phonemes`).
        phoneme: int64 [B, T, N], which of them sounds in each slot.
        voice: int64 [B].
    """
    slots = phoneme.shape[2]
    heard = phoneme[:, :, [slots * (2 * place + 1) // (2 * READ) for place in range(READ)]]
    said = tokens.gather(1, heard.flatten(1)).unflatten(1, heard.shape[1:])
    said = said + TOKENS * torch.arange(READ, device=said.device)
    spoken = (READ * TOKENS + voice)[:, None, None].expand(-1, said.shape[1], 1)
    return torch.cat([said, spoken], dim=2)


def as_actions(tokens: Tensor) -> Tensor:
    """Conditioning tokens [B, T, m] as what a backbone's `actions` are [B, T, IDS]: 1 for every token that is there."""
    return torch.zeros(*tokens.shape[:2], IDS, device=tokens.device).scatter_(2, tokens, 1.0)


@torch.no_grad()
def text_tokens(parts: SpeechParts, text: str, voice: str, *, speed: float = 1.0) -> Tensor:
    """A text's conditioning tokens int64 [1, T, READ + 1]: its sounds take as long as the speaking model has them."""
    model, device = parts.transformer, parts.transformer.device
    tokens = parts.pronouncer.phonemes(text)[None].to(device)
    number = torch.tensor([model.voice_number(voice)], device=device)
    durations = whole_slots(model.durations(model.encode_phonemes(tokens, number), speed), model.slots)
    frames = round(float(durations.sum()) / model.slots)
    return frame_tokens(tokens, make_plan(durations, 0, frames, model.slots).phoneme, number)
