"""Measure a world model against the true game: same start, same keys, frames the training never saw.

    millstream train data --out data/unseen --seed 1000 --shards 16 --frames 6000
    millstream evaluate --model freedoom --data data/unseen --split all --out runs/evaluation

One JSON object goes to standard output and to OUT/measures.json; contact sheets go beside it, because numbers miss a
dissolved enemy. No measure can be judged alone: PSNR rewards blur, sharpness rewards noise.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pipelines.world import WorldPipeline
from ..streaming import step_together
from .contact_sheet import contact_sheet
from .dataset import Episodes
from .drift import SCRIPTS, drift_score
from .environments import RATE
from .prompts import WORLDS
from .rollout import CONTEXT, Clips, choose, continue_clips, cut, truth
from .scores import Split, codec_score, frechet_score, psnr_scores, read_back_score, sharpness_scores

PSNR_AT = (1, 4, 8, 16, 32, 64, 120)
SHARPNESS_AT = (32, 120)
SHOWN_AT = (1, 4, 8, 16, 32, 64, 96, 120)
FRECHET_AT = 120


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured; 0 leaves a measure out.

    Attributes:
        starts: held-out starts per world for PSNR, sharpness, sheets and the probe.
        horizon: frames drawn from each.
        steps: sampler steps; None takes the model's own.
        codec_frames: per world.
        probe_steps: of training the probe.
        frechet: frames on each side; `frechet_per_stream` of them from each stream.
        long_frames: of the drift runs.
        batch_size: streams that step together.
    """

    starts: int = 8
    horizon: int = 128
    steps: int | None = None
    codec_frames: int = 64
    probe_steps: int = 3000
    frechet: int = 4096
    frechet_per_stream: int = 1
    long_frames: int = 2000
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name, least in (("horizon", 4), ("frechet_per_stream", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("starts", "codec_frames", "probe_steps", "frechet", "long_frames"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (left out) or more, got {getattr(self, name)}")
        if self.frechet_per_stream > 16:
            raise ValueError(
                f"frechet_per_stream must be at most 16, or frames come from too early in a stream, "
                f"got {self.frechet_per_stream}"
            )


def evaluate(
    pipe: WorldPipeline, episodes: Episodes, sizes: Sizes, out: Path, *, split: Split = "held_out", seed: int = 0
) -> dict[str, Any]:
    """All measures of `pipe` as one JSON-ready object; contact sheets are written to `out`.

    Args:
        split: "held_out" takes the last 6 % of each shard; "all" everything, for data of an unseen seed.

    Raises:
        ValueError: data of another frame size or other worlds than the model's, or too little of it.
    """
    if episodes.size != tuple(pipe.size):
        raise ValueError(f"the data have frames of {episodes.size}, the model draws {tuple(pipe.size)}")
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = _setting(pipe, sizes, split, seed)
    seconds: dict[str, float] = {}

    def measure(name: str, wanted: int, work: Callable[[], Any]) -> None:
        begun = time.monotonic()
        report[name] = work() if wanted else "skipped"
        seconds[name] = round(time.monotonic() - begun, 1)

    def frechet() -> dict[str, Any]:
        return frechet_score(
            pipe,
            episodes,
            split,
            frames=sizes.frechet,
            per_stream=sizes.frechet_per_stream,
            at=FRECHET_AT,
            steps=sizes.steps,
            seed=seed,
            batch_size=sizes.batch_size,
        )

    measure("frames_per_second", 1, lambda: speed(pipe, sizes))
    measure("codec_psnr_db", sizes.codec_frames, lambda: codec_score(pipe, episodes, split, sizes.codec_frames, seed))
    measure("clips", sizes.starts, lambda: _clips(pipe, episodes, sizes, out, split, seed))
    measure("frechet", sizes.frechet, frechet)
    measure("long", sizes.long_frames, lambda: _long(pipe, episodes.names, sizes, out, seed))
    report["seconds"] = seconds
    return report


def _setting(pipe: WorldPipeline, sizes: Sizes, split: Split, seed: int) -> dict[str, Any]:
    sampler = pipe.scheduler.config
    cuda = pipe.device.type == "cuda"
    return {
        "sampler": {
            "steps": sizes.steps or sampler["num_inference_steps"],
            **{name: sampler[name] for name in ("shift", "rule", "context_sigma")},
        },
        "window": pipe.config["window"],
        "context": CONTEXT,
        "split": split,
        "seed": seed,
        "device": torch.cuda.get_device_name(pipe.device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def speed(pipe: WorldPipeline, sizes: Sizes, frames: int = 24) -> dict[str, float]:
    """Frames per second of one stream, and of many stepped together; the first frames of each are not counted."""
    reached = {}
    for streams in sorted({1, sizes.batch_size}):
        sessions = [
            pipe.stream(
                pipe.worlds[row % len(pipe.worlds)],
                generator=torch.Generator().manual_seed(row),
                num_inference_steps=sizes.steps,
            )
            for row in range(streams)
        ]
        count = max(2, frames // streams)
        try:
            for _ in range(2):
                step_together(sessions)
            begun = time.monotonic()
            for _ in range(count):
                step_together(sessions)
            reached[f"{streams} together" if streams > 1 else "alone"] = round(
                streams * count / (time.monotonic() - begun), 1
            )
        finally:
            for session in sessions:
                session.close()
    return reached


def _clips(pipe: WorldPipeline, episodes: Episodes, sizes: Sizes, out: Path, split: Split, seed: int) -> dict[str, Any]:
    """Everything that is read from the same clips: PSNR, sharpness, the contact sheet, the probe."""
    horizon, generator = sizes.horizon, torch.Generator().manual_seed(seed)
    clips = cut(episodes, *choose(episodes, sizes.starts, CONTEXT + horizon, split, generator), CONTEXT + horizon)
    drawn = continue_clips(
        pipe,
        clips,
        horizons=range(1, horizon + 1),
        steps=sizes.steps,
        seed=seed,
        batch_size=sizes.batch_size,
        title="clips",
    )
    draw_sheet(clips, drawn, out / "clips.png")
    return {
        "starts_per_world": sizes.starts,
        "horizon": horizon,
        "psnr_db": psnr_scores(clips, drawn, [at for at in PSNR_AT if at <= horizon]),
        "sharpness_ratio": sharpness_scores(pipe, clips, drawn, [at for at in SHARPNESS_AT if at <= horizon]),
        "read_back": read_back_score(
            episodes, clips, drawn, steps=sizes.probe_steps, seed=seed, device=torch.device(pipe.device)
        )
        if sizes.probe_steps
        else "skipped",
    }


def draw_sheet(clips: Clips, drawn: Tensor, path: Path, rows_per_world: int = 1) -> None:
    """Truth above, model below: the first clips of every world over the horizon."""
    horizons = [at for at in SHOWN_AT if at <= drawn.shape[1]]
    rows = torch.cat([(clips.world == index).nonzero()[:rows_per_world, 0] for index in range(len(clips.names))])
    contact_sheet(
        truth(clips, horizons)[rows].numpy(),
        drawn[rows][:, [at - 1 for at in horizons]].numpy(),
        path,
        rows=[clips.names[index] for index in clips.world[rows].tolist()],
        columns=[f"+{at}" for at in horizons],
    )


def _long(pipe: WorldPipeline, names: Sequence[str], sizes: Sizes, out: Path, seed: int) -> dict[str, Any] | str:
    if not set(names) <= {world.name for world in WORLDS}:
        return "skipped: only the Doom worlds can be played under given keys"
    report = {}
    for kind in SCRIPTS:
        report[kind], true, mine = drift_score(
            pipe, names, kind, frames=sizes.long_frames, steps=sizes.steps, seed=seed
        )
        contact_sheet(
            true[None].numpy(),
            mine[None].numpy(),
            out / f"long_{kind}.png",
            rows=[f"{kind} keys, after {sizes.long_frames} frames ({sizes.long_frames / RATE:.0f} s)"],
            columns=[
                name if len(name) < 17 else f"{name[:7]}..{name[-7:]}" for name in names
            ],  # the ends tell them apart
        )
    return report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="millstream evaluate", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="freedoom", help="a shipped model, or a folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of shards (millstream train data)")
    parser.add_argument("--out", type=Path, required=True, help="folder for measures.json and the contact sheets")
    parser.add_argument(
        "--split",
        choices=("held_out", "all"),
        default="held_out",
        help="the last 6 %% of every shard, or all frames of data collected with a seed that training never saw",
    )
    sizes = Sizes()
    for name, text in (
        ("starts", "clips per world; 0 skips"),
        ("horizon", "frames drawn after each start"),
        ("codec-frames", "frames per world through the codec; 0 skips"),
        ("probe-steps", "training of the probe that reads the keys back; 0 skips"),
        ("frechet", "frames on each side of the Frechet distance; 0 skips"),
        ("frechet-per-stream", "frames that one stream gives to it"),
        ("long-frames", "length of the drift runs; 0 skips"),
        ("batch-size", "streams that step together"),
    ):
        parser.add_argument(f"--{name}", type=int, default=getattr(sizes, name.replace("-", "_")), help=text)
    parser.add_argument("--steps", type=int, help="sampler steps; the model's own by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = vars(parser.parse_args(argv))
    sizes = Sizes(**{name: arguments[name] for name in Sizes.__slots__})
    episodes = Episodes.open(arguments["data"])
    pipe = WorldPipeline.from_pretrained(arguments["model"]).to(arguments["device"])
    report = {"model": arguments["model"], "data": str(arguments["data"])} | evaluate(
        pipe, episodes, sizes, arguments["out"], split=arguments["split"], seed=arguments["seed"]
    )
    text = json.dumps(report, indent=2)
    (arguments["out"] / "measures.json").write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
