"""Sound: how fast it is made and coded, and whether streams equal the whole.

    python benchmarks/audio.py [--only masked,codec,published,frames,speech,soak] [--model DIR] [--threads N]
        [--seconds 400] [--minutes 10] [--device cpu] [--out audio.json]

Prints one JSON object; times are seconds, a real-time factor is computing time per second of sound (below 1 keeps up).

    masked      30 s of codes by masked parallel decoding at SoundStorm's published size (`audio_masked`)
    codec       the house's codec: encode and decode in chunks of one frame, against the whole
    published   Mimi, EnCodec and DAC at their published sizes with random weights, streamed the same way
    frames      codes frame after frame, several per pass by chained heads, random weights
    speech      a speaking model (`--model`): real-time factor, time to the first sound
    soak        `--minutes` of continuous speech through the jitter buffer: gaps and memory (`audio_soak`)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import audio_masked
import audio_soak
import audio_streams
import torch
from variants import describe, measure_all, publish

SECTIONS = ("masked", "codec", "published", "frames", "speech", "soak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"some of {','.join(SECTIONS)} (default: all that need no --model not given)")
    parser.add_argument("--model", help="folder of a speaking model, for speech and codec")
    parser.add_argument("--minutes", type=float, help="soak for so long (alone, unless --only names others)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--seconds", type=float, default=400, help="start no variant after this time")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--out", help="also write the JSON here")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report: dict[str, Any] = {"command": " ".join(sys.argv), "device": describe(device)}
    free = torch.cuda.empty_cache if device.type == "cuda" else lambda: None
    default = [name for name in SECTIONS if name != "soak" and (name != "speech" or arguments.model)]
    default = ["soak"] if arguments.minutes else default
    only = arguments.only.split(",") if arguments.only else default
    variants = plan(only, device, arguments.model, arguments.minutes or 10.0)
    report["variants"] = measure_all(variants, arguments.seconds, reserve=audio_masked.reserve, after=free)
    publish(report, arguments.out)


def plan(
    only: list[str], device: torch.device, model: str | None, minutes: float
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured, the most important first."""
    unknown = set(only) - set(SECTIONS)
    if unknown:
        raise SystemExit(f"--only takes some of {','.join(SECTIONS)}, got {','.join(only)}")
    sections: dict[str, Callable[[], dict[str, Callable[[], dict[str, Any]]]]] = {
        "masked": lambda: audio_masked.variants(device),
        "codec": lambda: audio_streams.codec_variants(device, model),
        "published": lambda: audio_streams.published_variants(device),
        "frames": lambda: audio_streams.frames_variants(device),
        "speech": lambda: audio_streams.speech_variants(device, model),
        "soak": lambda: audio_soak.soak_variants(device, model, minutes),
    }
    variants: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in only:
        variants |= sections[name]()
    return variants


if __name__ == "__main__":
    main()
