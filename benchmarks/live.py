"""An hour in front of a camera: does `millstream live` grow, age or drop more the longer it runs?

    python benchmarks/live.py --seconds 3600 --output hour.json
    python benchmarks/live.py --seconds 3600 --model nothing      the loop alone, at the camera's full 30 frames/s

A video is played in a loop (its own rate, as a camera would), redrawn by the world and handed to a viewer that takes
every frame at once. Prints JSON: the machine, the versions, and per minute of the run frames per second, age of a frame
at the viewer (from capture, p50 and p95), frames of the camera that were dropped, and resident memory; then by how much
the last quarter differs from the first, and the slope of memory. `--output` is written anew every minute, so that a run
that is interrupted tells how far it came. Needs psutil, which comes with accelerate.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from array import array
from pathlib import Path
from statistics import fmean, linear_regression, median
from typing import Any

import psutil
import torch

import millstream as ms
from millstream.ui.commands.bench import percentile
from millstream.ui.machine import machine, versions
from millstream.ui.world import load_world, positive_seconds

MINUTE = 60.0
LEAST_SLICES = 12  # of a run too short for minutes
WARM_UP = 0.1  # share of the run that is not compared: caches fill, allocators settle
NOTHING = "nothing"  # a model that gives its input back
MODEL_SIZE = (240, 320)  # of that one's pictures


class Viewer:
    """A sink that sums up each minute: when frames came, how old they were, what was dropped, what the process weighs.

    It keeps a handful of numbers per minute, so that its own notes are no growth.
    """

    def __init__(self, session: ms.Session, length: float, output: Path | None) -> None:
        self.session, self.length, self.output = session, length, output
        self.process = psutil.Process()
        self.start = self.since = time.monotonic()
        self.dropped = 0
        self.ages = array("d")
        self.slices: list[dict[str, float | int]] = []

    def write(self, chunk: ms.Chunk) -> None:
        now = time.monotonic()
        self.ages.append(now - chunk.time)
        if now - self.since >= self.length:
            self.sum_up(now)

    def sum_up(self, now: float) -> None:
        ages, seconds, dropped = sorted(self.ages), now - self.since, self.session.metrics.dropped
        self.slices.append(
            {
                "from_second": round(self.since - self.start, 1),
                "frames": len(ages),
                "frames_per_second": round(len(ages) / seconds, 3),
                "age_p50_ms": round(1000 * percentile(ages, 50), 2),
                "age_p95_ms": round(1000 * percentile(ages, 95), 2),
                "dropped_per_second": round((dropped - self.dropped) / seconds, 4),
                "memory_mb": round(self.process.memory_info().rss / 2**20, 2),
                "load": round(psutil.getloadavg()[0], 1),
            }
        )
        self.since, self.dropped = now, dropped
        del self.ages[:]
        if self.output is not None:
            self.output.write_text(json.dumps(trend(self.slices), indent=2), encoding="utf-8")

    def close(self) -> None: ...


def trend(slices: list[dict[str, float | int]]) -> dict[str, Any]:
    """How the last quarter of the run differs from the quarter after the warm-up; memory as a straight line."""
    settled = slices[max(1, round(WARM_UP * len(slices))) :]
    quarter = max(1, len(settled) // 4)
    growth, slope = {}, None
    if len(settled) > 1:
        for name in ("frames_per_second", "age_p50_ms", "age_p95_ms", "dropped_per_second", "memory_mb"):
            before, after = (median(each[name] for each in part) for part in (settled[:quarter], settled[-quarter:]))
            growth[name] = round(after - before, 4)
        hours = [each["from_second"] / 3600 for each in settled]
        slope = round(linear_regression(hours, [each["memory_mb"] for each in settled]).slope, 3)
    whole = {name: round(fmean(each[name] for each in slices), 3) for name in slices[0] if name != "from_second"}
    return {"mean": whole, "growth": growth, "memory_mb_per_hour": slope, "slices": slices}


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
    parser.add_argument("--model", default="freedoom", help=f"{NOTHING} gives its input back (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the numbers there every minute, too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--strength", type=float, default=0.4)
    parser.add_argument("--stream-batch", action="store_true")
    parser.add_argument("--skip-similar", type=float)
    parser.add_argument("--follow-motion", type=float, default=0.0)
    asked = parser.parse_args()
    settings = {name: getattr(asked, name) for name in ("strength", "stream_batch", "skip_similar", "follow_motion")}
    if asked.model == NOTHING:
        from serve import Mirror

        pipe, device, settings = Mirror(30.0, MODEL_SIZE), "none", {}
    else:
        pipe = load_world(asked.model, asked.device)
        device = str(pipe.device)
    length = min(MINUTE, asked.seconds / LEAST_SLICES)
    with tempfile.TemporaryDirectory() as folder:
        video = ms.VideoFile(asked.video or pan(folder), loop=True)
        with pipe.stream(pipe.worlds[0], generator=torch.Generator().manual_seed(0), **settings) as session:
            viewer = Viewer(session, length, asked.output)
            metrics = ms.live(video, session, viewer, until=asked.seconds)
    result = {
        "command": " ".join(["python", "benchmarks/live.py", *sys.argv[1:]]),
        "device": device,
        "camera_rate": video.rate,
        "settings": settings,
        **trend(viewer.slices),
        "metrics": metrics.as_dict(),
        "machine": machine(),
        "versions": versions(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if asked.output is not None:
        asked.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
