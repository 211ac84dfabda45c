"""What one stream of speech is, and how a saved one is read back."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..models.audio_layers import AudioState
from ..streaming.kv_cache import KVCache
from ..streaming.types import Leaves

CACHE, CODEC = "cache.", "codec."


@dataclass
class SpeechState:
    """One stream: its memory, the seed of its noise, what it will say and how far it is.

    Attributes:
        cache, codec: what the backbone and the decoder remember; one row each.
        latents: [1, C], the last frame.
        actions: [F, D], what the frames that are planned but not drawn are told.
        waiting: words that are not planned yet, read out as `read_words` does, with spaces between.
        voice: in which the last planned words are spoken.
        frame: frames drawn.
        given: samples handed out.
        late: samples of the codec's delay that are still to be left out.
    """

    cache: KVCache
    codec: AudioState
    latents: Tensor
    actions: Tensor
    seed: int
    waiting: str = ""
    voice: str = ""
    frame: int = 0
    given: int = 0
    late: int = 0


TENSORS = ("latents", "actions")
PLAIN = {field.name: {"int": int, "str": str}[str(field.type)] for field in fields(SpeechState)[4:]}


def to_leaves(state: SpeechState) -> Leaves:
    """A stream, ready for a file."""
    leaves: Leaves = {name: getattr(state, name) for name in PLAIN}
    leaves |= {name: getattr(state, name).clone() for name in TENSORS}
    leaves |= {CACHE + name: value for name, value in state.cache.snapshot(0).items()}
    return leaves | {CODEC + name: value for name, value in state.codec.snapshot(0).items()}


def fill(state: SpeechState, leaves: Leaves) -> SpeechState:
    """Make a fresh `state` what was saved.

    Raises:
        ValueError: these are not the leaves of speech, or another model's.
    """
    plain: dict[str, Any] = {name: value for name, value in leaves.items() if "." not in name}
    if plain.keys() != {*PLAIN, *TENSORS}:
        raise ValueError(f"this is not the snapshot of speech: it holds {', '.join(sorted(leaves)[:8])}")
    for name, kind in (*PLAIN.items(), *((name, Tensor) for name in TENSORS)):
        if not isinstance(plain[name], kind):
            raise ValueError(f"the snapshot is damaged: {name} is a {type(plain[name]).__name__}")
    for name in TENSORS:
        own, value = getattr(state, name), plain[name]
        if value.ndim != 2 or value.shape[1] != own.shape[1]:
            raise ValueError(f"the saved {name} are {list(value.shape)}, this model needs [.., {own.shape[1]}]")
        setattr(state, name, value.to(own, copy=True))
    for name in PLAIN:
        setattr(state, name, plain[name])
    try:
        state.cache.restore(0, _part(leaves, CACHE))
        state.codec.restore(0, _part(leaves, CODEC))
    except KeyError as missing:
        raise ValueError(f"the snapshot is damaged: it lacks {CACHE}{missing.args[0]}") from None
    return state


def as_voice(leaves: Leaves, seed: int, late: int) -> Leaves:
    """A stream that has said nothing yet, in a saved one's voice and with its memory. `late`: the codec's delay."""
    actions = leaves.get("actions")
    quiet: dict[str, Any] = {"seed": seed, "waiting": "", "given": 0, "late": late}
    if isinstance(actions, Tensor):
        quiet["actions"] = torch.zeros_like(actions[:0])
    return {**leaves, **quiet}


def _part(leaves: Leaves, prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in leaves.items() if name.startswith(prefix)}
