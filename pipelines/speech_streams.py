"""What a session asks of a speaking model (`Streamable`): check, begin, advance, flush, save, load, end.

Words are planned a phrase at a time, as late as possible: how long each sound takes is known before its frames are
drawn, and whatever is appended meanwhile follows. A phrase ends at a rest, so where it is cut nobody hears.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from ..models.reading import PAUSE as REST
from ..models.reading import read_words
from ..models.speech import make_plan
from ..streaming import Chunk, Frame, SpeechControl
from ..streaming.types import Leaves
from .speech_draw import SpeechParts, draw_latents, noised_past, whole_slots
from .speech_state import SpeechState, fill, to_leaves

CHUNK_SECONDS = 0.08
PHRASE_WORDS = 8  # a shorter phrase is planned with the next
MOST_WORDS = 60  # who does not rest for so long is made to
WAITING_CHARACTERS = 100_000  # of words that wait to be spoken


class SpeechStreams:
    """The part of an audio pipeline that its sessions see."""

    transformer: Any
    codec: Any
    pronouncer: Any
    scheduler: Any
    temperature: float
    rate: float  # chunks per second of sound
    _sharing: RLock  # sessions may run on threads of their own, and the pronouncer keeps words that it has met

    @property
    def parts(self) -> SpeechParts:
        return SpeechParts(self.transformer, self.codec, self.pronouncer, self.scheduler)

    @property
    def voices(self) -> tuple[str, ...]:
        """Names that a control's `voice` may have; the first is the default."""
        return tuple(self.transformer.config["voices"])

    @property
    def sampling_rate(self) -> int:
        """Samples per second."""
        return int(self.codec.sample_rate)

    @property
    def frames_per_chunk(self) -> int:
        """Frames of latents in 80 ms."""
        return max(1, round(CHUNK_SECONDS * self.codec.frame_rate))

    @property
    def delay(self) -> int:
        """Samples by which the codec's decoded sound is late."""
        return getattr(self.codec, "delay", 0)

    def check(self, control: SpeechControl) -> None:
        """Refuse a voice that is not there and a text without a word in it. No text at all is silence."""
        if control.voice:
            self.transformer.voice_number(control.voice)
        if control.text and set(read_words(control.text)) <= {REST}:
            raise ValueError("there is nothing to say: give English words or numbers")

    def begin(self, control: SpeechControl, *, generator: torch.Generator | None = None) -> SpeechState:
        return self._silent(draw_seed(generator))

    def _silent(self, seed: int) -> SpeechState:
        config, weight = self.transformer.config, self.transformer.backbone.proj_out.weight
        return SpeechState(
            self.transformer.make_cache(),
            self.codec.begin(),
            weight.new_zeros(1, config["latent_channels"]),
            weight.new_zeros(0, config["dim"]),
            seed,
            late=self.delay,
        )

    @torch.no_grad()
    def advance(
        self, states: Sequence[SpeechState], controls: Sequence[SpeechControl], media: Sequence[Frame | None]
    ) -> Sequence[Sequence[Chunk]]:
        """80 ms of sound for every state that has something to say; less where a text ends."""
        with self._sharing:
            return [self._advance(state, control) for state, control in zip(states, controls)]

    def _advance(self, state: SpeechState, control: SpeechControl) -> list[Chunk]:
        if control.text:
            words = " ".join([state.waiting, *read_words(control.text)]).strip()
            if len(words) > WAITING_CHARACTERS:
                raise ValueError(f"more than {WAITING_CHARACTERS:,} characters wait to be spoken; append later")
            state.waiting = words
        latents: list[Tensor] = []
        while len(latents) < self.frames_per_chunk and not self.ended(state):
            if len(state.actions):
                latents.append(self._draw(state))
            else:
                self._plan(state, control.voice or self.voices[0])
        return self._sound(state, torch.stack(latents, dim=-1), control.version) if latents else []

    def _plan(self, state: SpeechState, voice: str) -> None:
        """Take the next phrase from the words that wait, and tell its frames what to sound like."""
        phrase, state.waiting = first_phrase(state.waiting)
        model, device = self.transformer, self.transformer.device
        tokens = self.pronouncer.phonemes(phrase)[None].to(device)
        number = torch.tensor([model.voice_number(voice)], device=device)
        encoded = model.encode_phonemes(tokens, number)
        durations = model.durations(encoded)
        if state.frame:
            durations[:, 0] = 0  # the phrase before has rested already
        durations = whole_slots(durations, model.slots)
        frames = round(float(durations.sum()) / model.slots)
        plan = make_plan(durations, 0, frames, model.slots)
        state.actions, state.voice = model.frame_actions(encoded, plan, number)[0], voice

    def _draw(self, state: SpeechState) -> Tensor:
        """The latents [1, C] of the next frame."""
        seeds, frames = (torch.tensor([value], device=state.latents.device) for value in (state.seed, state.frame))
        past = noised_past(self.parts, state.latents, seeds, frames)
        sigma = self.scheduler.config["context_sigma"]
        said = self.transformer.next_frames(past, state.actions[:1], state.cache, [0], sigma)
        state.latents = draw_latents(self.parts, said, seeds, frames, temperature=self.temperature)
        state.actions = state.actions[1:]
        state.frame += 1
        return state.latents

    def _sound(self, state: SpeechState, latents: Tensor, version: int) -> list[Chunk]:
        """Latents [1, C, n] as sound, without what the codec's delay puts before the first."""
        sound = self.codec.decode_step(latents, state.codec)[0].float()
        early = min(state.late, sound.shape[1])
        state.late -= early
        sound = sound[:, early:]
        if not sound.shape[1]:
            return []
        state.given += sound.shape[1]
        start = state.given - sound.shape[1]
        return [Chunk("audio", sound, start, self.sampling_rate, version, time.monotonic())]

    def ended(self, state: SpeechState) -> bool:
        """Is everything said?"""
        return not state.waiting and not len(state.actions)

    @torch.no_grad()
    def flush(self, state: SpeechState) -> Sequence[Chunk]:
        """The end of the last sound, by which the codec is late."""
        if not self.delay or not state.given:
            return []
        rest = state.latents[..., None].expand(-1, -1, -(-self.delay // self.codec.hop))
        with self._sharing:
            chunks = self._sound(state, rest, 0)
        return [replace(chunk, data=chunk.data[:, : self.delay]) for chunk in chunks]

    def save(self, state: SpeechState) -> Leaves:
        with self._sharing:
            return to_leaves(state)

    def load(self, leaves: Leaves) -> SpeechState:
        return fill(self._silent(0), leaves)

    def end(self, state: SpeechState) -> None:
        """A stream's memory is its own and goes with it."""


def draw_seed(generator: torch.Generator | None) -> int:
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else None))


def first_phrase(words: str) -> tuple[str, str]:
    """Words up to the first rest after `PHRASE_WORDS`, at most `MOST_WORDS`, and the others."""
    parts = words.split()
    for place, word in enumerate(parts):
        if word == REST and place >= PHRASE_WORDS:
            return " ".join(parts[:place]), " ".join(parts[place + 1 :])
        if place == MOST_WORDS:
            return " ".join(parts[:place]), " ".join(parts[place:])
    return words, ""
