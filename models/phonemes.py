"""The sounds of American English as tokens, and what a speech model needs to know of their neighbours.

A token is a phoneme, whether its syllable is stressed, and whether a word begins with it:

    token = 4 * phoneme + 2 * stressed + begins
"""

from __future__ import annotations

import torch
from torch import Tensor

PHONEMES = (
    *("pau", "aa", "ae", "ah", "ao", "aw", "ax", "ay", "b", "ch", "d", "dh", "eh", "er", "ey", "f", "g", "hh", "ih"),
    *("iy", "jh", "k", "l", "m", "n", "ng", "ow", "oy", "p", "r", "s", "sh", "t", "th", "uh", "uw", "v", "w", "y"),
    *("z", "zh"),
)
NUMBERS = {name: number for number, name in enumerate(PHONEMES)}
PAUSE = 0  # the token of "pau"; every utterance begins and ends with one
PADDING = 4 * len(PHONEMES)
TOKENS = PADDING + 1
REACH = 15  # distances to the nearest pause are counted this far


def token(phoneme: str, stressed: bool = False, begins: bool = False) -> int:
    """Raises KeyError for a name that is none of `PHONEMES`."""
    return 4 * NUMBERS[phoneme] + 2 * stressed + begins


def spell(tokens: Tensor) -> str:
    """Tokens [P] as text: "hh'ax l'ow" is " hh ax l 'ow", a space before words and ' before stressed sounds."""
    parts = []
    for value in tokens.tolist():
        if value < PADDING:
            mark = "'" if value & 2 else ""
            parts.append((" | " if value & 1 else " ") + mark + PHONEMES[value // 4])
    return "".join(parts).strip(" |")


def pause_distances(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """How many sounds ago the last pause was and in how many the next comes, int64 [B, P] each, `REACH` at most."""
    place = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
    pause = (tokens // 4 == PAUSE) | (tokens == PADDING)
    before = torch.where(pause, place, -REACH).cummax(dim=-1).values
    after = torch.where(pause, place, tokens.shape[-1] + REACH).flip(-1).cummin(dim=-1).values.flip(-1)
    return (place - before).clamp_max(REACH), (after - place).clamp_max(REACH)
