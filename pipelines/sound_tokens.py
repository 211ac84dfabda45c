"""Clips of residual codes drawn in parallel: the network that `samplers.decoding_levels` asks.

Shapes: B batch, Q levels, T frames, P frames of a prompt, K conditioning tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.masked_sound import MaskedSoundTransformer
from ..samplers import Ask, Categorical, Codebooks, Confidence, Level, cosine_counts, decoding_levels
from .token_networks import PhiloxDraws

STEPS = (16,)  # SoundStorm's: 16 passes for the first level, one for each other


class LevelsNetwork:
    """Answers `samplers.decoding_levels`.

    Args:
        model: the transformer.
        frames: T.
        condition: int64 [B, K] or [B, K, m], or None.
        prompt: int64 [B, Q, P], the codes that the clip begins with, or None.
    """

    def __init__(
        self, model: MaskedSoundTransformer, frames: int, condition: Tensor | None, prompt: Tensor | None
    ) -> None:
        self.model, self.frames, self.prompt = model, frames, prompt
        self.given, self.rotary = model.given(condition, frames), model.rotary(frames)
        self._level, self._still = -1, self.given

    def __call__(self, level: int, canvas: Tensor | None, ask: Ask) -> Tensor:
        if level != self._level:  # what does not change between the steps of a level
            still = self.given + self.model.finer(level, self.prompt, self.frames)
            self._level, self._still = level, still if canvas is None else still + canvas
        x = self._still + self.model.tokens.shown(level, ask.tokens, ask.known)
        return self.model.predict(level, x, self.rotary, ask.targets)


def level_plan(
    levels: int, frames: int, steps: Sequence[int] = STEPS, temperature: float = 1.0, choice_temperature: float = 4.5
) -> list[Level]:
    """How each level is decided: masked steps by confidence where `steps` says more than one, else one greedy pass.

    More steps than frames are cut to one frame each.

    Args:
        levels: Q.
        frames: to decide, those of a prompt left out.
        steps: passes of the first levels; one for each level after them.
        temperature: of the codes that are decided in several steps.
        choice_temperature: see `Confidence`.

    Raises:
        ValueError: more levels in `steps` than there are.
    """
    if len(steps) > levels:
        raise ValueError(f"steps must be for at most {levels} levels, got {list(steps)}")
    plan = []
    for count in [*steps, *[1] * (levels - len(steps))]:
        counts = cosine_counts(frames, min(count, frames))
        sure = Level(Categorical(temperature), counts, Confidence(choice_temperature))
        plan.append(sure if count > 1 else Level(Categorical(0.0), counts))
    return plan


@torch.no_grad()
def draw_codes(
    model: MaskedSoundTransformer,
    frames: int,
    seeds: Tensor,
    *,
    condition: Tensor | None = None,
    prompt: Tensor | None = None,
    steps: Sequence[int] = STEPS,
    temperature: float = 1.0,
    choice_temperature: float = 4.5,
) -> Tensor:
    """A clip's codes int64 [B, Q, T], coarse levels first, for a codec's `dequantize`.

    Nothing is read back from the device, so the whole drawing can be recorded as one CUDA graph.

    Args:
        model: the transformer.
        frames: T, those of the prompt included.
        seeds: int64 [B]; a clip depends on its own seed alone.
        condition: int64 [B, K] or [B, K, m]: what is to be said (semantic tokens).
        prompt: int64 [B, Q, P], codes of a voice to go on in; they are the first of the clip.
        steps, temperature, choice_temperature: see `level_plan`.

    Raises:
        ValueError: a prompt of another shape or as long as the clip, and what `level_plan` refuses.
    """
    levels = model.config["levels"]
    kept = 0 if prompt is None else prompt.shape[-1]
    if prompt is not None and (prompt.shape[:-1] != (len(seeds), levels) or kept >= frames):
        raise ValueError(
            f"the prompt must be codes [{len(seeds)}, {levels}, P] of fewer than {frames} frames, "
            f"got {list(prompt.shape)}"
        )
    books = Codebooks(model.tokens.embed, levels, frames, model.tokens.masks, model.config["dim"])
    done = decoding_levels(
        LevelsNetwork(model, frames, condition, prompt),
        books,
        level_plan(levels, frames - kept, steps, temperature, choice_temperature),
        batch=len(seeds),
        draws=PhiloxDraws(seeds),
        prompt=None if prompt is None else list(prompt.unbind(1)),
    )
    return torch.stack([level.tokens for level in done], dim=1)
