"""Published audio codecs, loaded by transformers and streamed with the interface of `audio_codec.AudioCodec`.

    Mimi      causal; a piece of any number of frames gives as many
    EnCodec   causal but for its first samples, which it mirrors: the first 7 frames come together
    DAC       not causal: frames are held back until what they depend on is there (`held`), and computed with it

Streamed in any pieces, the frames and samples are those of the whole clip under transformers' own `encode` and
`decode`, to rounding. At the end of a clip, `encode_rest` and `decode_rest` give what is still held back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .codec_base import PublishedCodec
from .dac_codec import WindowedCodec
from .seanet_codec import SeanetCodec

__all__ = ["PublishedCodec", "SeanetCodec", "WindowedCodec", "load_codec", "wrap_codec"]


def load_codec(folder: str | Path, *, torch_dtype: torch.dtype | None = None) -> PublishedCodec:
    """A published codec's folder (config.json and weights), by the class that its configuration names.

    Raises:
        ValueError: no folder of a codec that can be streamed.
    """
    file = Path(folder) / "config.json"
    kind = json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.is_file() else None
    if kind not in ("mimi", "encodec", "dac"):
        seen = f"model_type {kind!r}" if file.is_file() else "no config.json"
        raise ValueError(f"{folder} must be the folder of a mimi, encodec or dac model, got {seen}")
    from transformers import DacModel, EncodecModel, MimiModel

    model = {"mimi": MimiModel, "encodec": EncodecModel, "dac": DacModel}[kind].from_pretrained(folder)
    return wrap_codec(model if torch_dtype is None else model.to(torch_dtype))


def wrap_codec(model: Any) -> PublishedCodec:
    """A codec of transformers (`MimiModel`, `EncodecModel`, `DacModel`) as one that streams.

    Raises:
        TypeError: another model. ValueError: one that cannot be streamed.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind in ("mimi", "encodec"):
        return SeanetCodec(model)
    if kind == "dac":
        return WindowedCodec(model)
    raise TypeError(f"a codec must be transformers' MimiModel, EncodecModel or DacModel, got {kind}")
