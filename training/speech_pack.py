"""Put a trained codec, speaking model and pronouncer into one folder, weights packed to int8.

millstream train speech-pack --codec runs/speech-codec --model runs/speech --words runs/speech-words --out runs/packed
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.audio_codec import AudioCodec
from ..models.pronouncer import Pronouncer
from ..models.speech import SpeechTransformer
from ..pipelines.audio import AudioPipeline
from ..pipelines.speech_draw import SpeechParts
from ..samplers import FlowSampler


def pack(parts: SpeechParts, out: Path, temperature: float = 1.0) -> int:
    """Save every part below `out`, as `AudioPipeline.from_pretrained` loads it; returns the bytes of all weights."""
    for name, part in zip(SpeechParts._fields, parts[:3]):
        part.save_packed(out / name)
    parts.scheduler.save_pretrained(out / "scheduler")
    AudioPipeline(*parts, temperature=temperature).save_config(out)
    return sum(file.stat().st_size for file in out.rglob("*.safetensors"))


def load_parts(folder: Path) -> SpeechParts:
    """The models below a packed folder, float32."""
    sampler: Any = FlowSampler.from_pretrained(folder / "scheduler")
    return SpeechParts(
        SpeechTransformer.from_pretrained(folder / "transformer").eval(),
        AudioCodec.from_pretrained(folder / "codec").eval(),
        Pronouncer.from_pretrained(folder / "pronouncer").eval(),
        sampler,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="millstream train speech-pack", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--codec", type=Path, required=True, help="folder of the trained codec")
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained speaking model")
    parser.add_argument("--words", type=Path, required=True, help="folder of the trained pronouncer")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--sampler-steps", type=int, default=4)
    parser.add_argument("--shift", type=float, default=1.0, help="warps the levels towards the noisy end")
    parser.add_argument("--context-sigma", type=float, default=0.1, help="level at which the last frame is shown")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the noise that a frame starts from")
    arguments = parser.parse_args(argv)
    sampler = FlowSampler(
        num_inference_steps=arguments.sampler_steps, shift=arguments.shift, context_sigma=arguments.context_sigma
    )
    parts = SpeechParts(
        SpeechTransformer.from_pretrained(arguments.model, torch_dtype=torch.float32).eval(),
        AudioCodec.from_pretrained(arguments.codec, torch_dtype=torch.float32).eval(),
        Pronouncer.from_pretrained(arguments.words, torch_dtype=torch.float32).eval(),
        sampler,
    )
    print(f"{arguments.out}: {pack(parts, arguments.out, arguments.temperature):,} bytes of weights")


if __name__ == "__main__":
    main()
