"""An hour in front of a camera: does `millstream live` grow, age or drop more the longer it runs?

    python benchmarks/live.py --seconds 3600 > live.json

A video is played in a loop (its own rate, as a camera would), redrawn by the world and handed to a viewer that takes
every frame at once. Prints JSON: the machine, the versions, and per slice of the run frames per second, age of a frame
at the viewer (from capture, p50 and p95), frames of the camera that were dropped, and resident memory; then by how much
the last slices differ from the first ones. Needs psutil, which comes with accelerate.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

import millstream as ms
from millstream.ui.commands.bench import percentile
from millstream.ui.machine import machine, versions
from millstream.ui.world import load_world, positive_seconds

SLICES = 12
WARM_UP = 0.1  # share of the run that is not compared: caches fill, allocators settle


class Viewer:
    """A sink that notes when each frame arrived, how old it was, and what the process weighs."""

    def __init__(self, session: ms.Session) -> None:
        self.session, self.process = session, psutil.Process()
        self.start = time.monotonic()
        self.notes: list[tuple[float, float, int, int]] = []  # when, age, dropped so far, bytes

    def write(self, chunk: ms.Chunk) -> None:
        now = time.monotonic()
        note = (now - self.start, now - chunk.time, self.session.metrics.dropped, self.process.memory_info().rss)
        self.notes.append(note)

    def close(self) -> None: ...


def slice_of(notes: list[tuple[float, float, int, int]]) -> dict[str, float | int]:
    seconds = notes[-1][0] - notes[0][0]
    ages = [age for _, age, _, _ in notes]
    return {
        "from_second": notes[0][0],
        "frames": len(notes),
        "frames_per_second": (len(notes) - 1) / seconds,
        "age_p50": percentile(sorted(ages), 50),
        "age_p95": percentile(sorted(ages), 95),
        "dropped_per_second": (notes[-1][2] - notes[0][2]) / seconds,
        "memory": notes[-1][3],
    }


def report(notes: list[tuple[float, float, int, int]]) -> dict[str, Any]:
    """Slices of equal time, and how the last quarter of the run differs from the quarter after the warm-up."""
    end = notes[-1][0]
    cut = [[note for note in notes if n <= SLICES * note[0] / end < n + 1] for n in range(SLICES)]
    settled = [note for note in notes if note[0] >= WARM_UP * end]
    quarter = len(settled) // 4
    first, last = slice_of(settled[:quarter]), slice_of(settled[-quarter:])
    return {
        "whole": slice_of(notes),
        "growth": {name: last[name] - first[name] for name in ("age_p50", "age_p95", "dropped_per_second", "memory")},
        "slices": [slice_of(part) for part in cut if len(part) > 1],
    }


def pan(folder: str) -> Path:
    """Ten seconds of a camera at 30 frames per second, 480x640, that pans to and fro over a smooth picture."""
    path = Path(folder) / "pan.mp4"
    coarse = torch.rand(1, 3, 8, 24, generator=torch.Generator().manual_seed(0))
    wide = torch.nn.functional.interpolate(coarse, (480, 1440), mode="bicubic").clamp(0, 1)[0]
    with ms.Recorder(path, rate=30) as recorder:
        for number in range(300):
            left = int(800 * (0.5 - 0.5 * torch.cos(torch.tensor(number * 2 * torch.pi / 300))))
            recorder.write(ms.Chunk("video", wide[None, :, :, left : left + 640], number, 30, 0, 0.0))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=positive_seconds, default=3600.0, help="default: an hour")
    parser.add_argument("--video", type=Path, help="default: a generated pan, 30 frames per second, 480x640")
    parser.add_argument("--model", default="freedoom")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--strength", type=float, default=0.4)
    parser.add_argument("--stream-batch", action="store_true")
    parser.add_argument("--skip-similar", type=float)
    parser.add_argument("--follow-motion", type=float, default=0.0)
    asked = parser.parse_args()
    pipe = load_world(asked.model, asked.device)
    settings = {name: getattr(asked, name) for name in ("strength", "stream_batch", "skip_similar", "follow_motion")}
    with tempfile.TemporaryDirectory() as folder:
        video = ms.VideoFile(asked.video or pan(folder), loop=True)
        with pipe.stream(pipe.worlds[0], generator=torch.Generator().manual_seed(0), **settings) as session:
            viewer = Viewer(session)
            metrics = ms.live(video, session, viewer, until=asked.seconds)
    result = {
        "command": " ".join(["python", "benchmarks/live.py", *sys.argv[1:]]),
        "device": str(pipe.device),
        "camera_rate": video.rate,
        "settings": settings,
        **report(viewer.notes),
        "metrics": metrics.as_dict(),
        "machine": machine(),
        "versions": versions(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
