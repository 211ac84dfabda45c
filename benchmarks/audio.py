"""Sound: how fast it is made and coded, and whether streams equal the whole.

    python benchmarks/audio.py [--only masked,codec,published,speech] [--model DIR] [--threads N] [--seconds 400]
        [--device cpu] [--out audio.json]

Prints one JSON object; times are seconds, a real-time factor is computing time per second of sound (below 1 keeps up).

    masked      30 s of codes by masked parallel decoding at SoundStorm's published size (`audio_masked`)
    codec       the house's codec: encode and decode in chunks of one frame, against the whole
    published   Mimi, EnCodec and DAC at their published sizes with random weights, streamed the same way
    speech      a speaking model (`--model`): real-time factor, time to the first sound
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import audio_masked
import torch
from variants import describe, measure_all, publish

SECTIONS = ("masked",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)} (default: all)")
    parser.add_argument("--model", help="folder of a speaking model, for the section speech")
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
    variants = plan(arguments.only.split(","), device)
    report["variants"] = measure_all(variants, arguments.seconds, reserve=audio_masked.reserve, after=free)
    publish(report, arguments.out)


def plan(only: list[str], device: torch.device) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured, the most important first."""
    unknown = set(only) - set(SECTIONS)
    if unknown:
        raise SystemExit(f"--only takes some of {','.join(SECTIONS)}, got {','.join(only)}")
    variants: dict[str, Callable[[], dict[str, Any]]] = {}
    if "masked" in only:
        variants |= audio_masked.variants(device)
    return variants


if __name__ == "__main__":
    main()
