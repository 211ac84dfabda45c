"""How far each preset is from `exact` on the shipped world: pictures after 32 frames, character after 2,000.

    python benchmarks/presets.py [--out presets.json] [--long 2000] [--streams 2] [--steps 4] [--only NAME]

Random weights make approximations look harmless, so quality is judged on a model that was trained. Every stream begins
with frames that `exact` drew, and goes on under the same keys and the same noise. The parts of a preset are forced here
even where a model as small as this would be left alone. The world that ships takes two steps, of which `fast` keeps
nothing; `--steps 4` judges what it keeps over as many steps as most recipes of video take.

`psnr_32` is the mean over 32 frames and all streams, in dB; a stream's own `psnr` is that of its mean error.
`feature_drift` is the largest relative change of contrast, colourfulness, sharpness and mean colour over the second
half of the long streams, all streams together; `colours` the distance of their colour histograms. The row `other noise`
is `exact` itself with another seed: what two equally good streams differ by. Bar: 35 dB, 0.05.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from variants import describe, measure_all, publish

import millstream as ms
from millstream.pipelines.presets import PRESETS, Preset
from millstream.training.behaviour import BUTTONS, wander
from millstream.training.measures import (
    colour_histogram,
    colourfulness,
    contrast,
    histogram_distance,
    images,
    psnr,
    sharpness,
)
from millstream.training.rollout import CONTEXT, draw, keys_of

BAR = {"psnr_32": 35.0, "feature_drift": 0.05}
WARM = 24  # frames that `exact` draws from nothing before the streams part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="freedoom")
    parser.add_argument("--out", help="also write the JSON here, anew after every row")
    parser.add_argument("--long", type=int, default=2000, help="frames of the long streams; 0 draws none")
    parser.add_argument("--streams", type=int, default=2, help="streams per world")
    parser.add_argument("--steps", type=int, help="of the sampler; the model's own by default")
    parser.add_argument("--seconds", type=float, default=500, help="start no row after this time")
    parser.add_argument("--only", help="rows whose name contains this")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report: dict[str, Any] = {"command": " ".join(sys.argv), "device": describe(device), "bar": BAR, "rows": {}}

    def keep(measured: dict[str, Any]) -> None:
        report["rows"] = measured
        if arguments.out:
            publish(report, arguments.out, printed=False)

    judge = Judge(arguments.model, device, arguments.streams, arguments.long, arguments.steps)
    rows = {name: row for name, row in judge.rows().items() if (arguments.only or "") in name}
    measure_all(rows, arguments.seconds, keep=keep)
    publish(report, arguments.out)


class Judge:
    """The streams of `exact`, which all presets are compared with."""

    def __init__(self, model: str, device: torch.device, streams: int, long: int, steps: int | None) -> None:
        self.model, self.device, self.long, self.steps = model, device, long, steps
        pipe = self.pipe("exact", torch.float32)
        self.prompts, self.keys = [*pipe.worlds] * streams, keys_of(pipe, BUTTONS)
        frames = max(32, long) + WARM
        walks = [wander(frames, np.random.default_rng(number)) for number in range(len(self.prompts))]
        self.actions = torch.from_numpy(np.stack(walks))
        height, width = pipe.size
        nothing = torch.zeros((len(self.prompts), 0, height, width, 3), dtype=torch.uint8)
        self.context = torch.stack(self.drawn(pipe, nothing, self.actions[:, :WARM], seed=50), 1)[:, -CONTEXT:]
        self.exact = self.drawn(pipe, self.context, self.actions[:, WARM - CONTEXT :], seed=0)

    def rows(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Presets, then the parts of `fast` and `small`."""
        fast = replace(PRESETS["fast"], least_window=0)
        parts = {
            "fast": fast,
            "small": PRESETS["small"],
            "fast, attending in bfloat16": replace(fast, attention=None),
            "fast, attending in bfloat16, kept earlier": replace(fast, attention=None, reuse=2),
            "fast, attending in bfloat16, kept from the first step on": replace(fast, attention=None, reuse=1),
            "fast, kept earlier": replace(fast, reuse=2),
            "fast, nothing kept": replace(fast, reuse=0),
            "fast, in FP8": replace(fast, linears="fp8"),
            "fast, products alone": replace(fast, attention=None, reuse=0),
            "fast, products alone, in FP8": replace(fast, linears="fp8", attention=None, reuse=0),
            "fast, kept attention alone": replace(fast, linears=None, attention=None),
            "fast, attention in FP8 alone": replace(fast, linears=None, reuse=0),
            "small, int8 products alone": replace(PRESETS["small"], kv=None),
            "keys in int8": Preset("keys in int8", kv="int8"),
            "keys in FP8": Preset("keys in FP8", kv="fp8"),
        }
        rows = {name: partial(self.row, preset) for name, preset in parts.items()}
        rows = {"fast": rows.pop("fast"), "other noise": partial(self.row, "exact", seed=1000)} | rows
        return rows | {
            "exact in bfloat16": partial(self.row, "exact", dtype=torch.bfloat16),
            "fast in bfloat16": partial(self.row, fast, dtype=torch.bfloat16),
        }

    def pipe(self, preset: Preset | str, dtype: torch.dtype) -> ms.WorldPipeline:
        pipe = ms.WorldPipeline.from_pretrained(self.model, preset=preset).to(self.device)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module) and dtype != torch.float32:
                torch.nn.Module.to(part, dtype)
        return pipe

    def drawn(self, pipe: ms.WorldPipeline, context: torch.Tensor, actions: torch.Tensor, seed: int) -> list[Any]:
        """Frames uint8 [streams, H, W, 3]."""
        return list(draw(pipe, self.prompts, context, actions, self.keys, steps=self.steps, seed=seed, title=None))

    def row(self, preset: Preset | str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
        """One preset against `exact`."""
        pipe = self.pipe(preset, dtype)
        # A world's recorded steps do not know where a frame lies, and keep no attention in FP8. Videos' do, which these
        # rows speak for.
        pipe.arena.recordings._record = None
        mine = self.drawn(pipe, self.context, self.actions[:, WARM - CONTEXT :], seed)
        near, far = (images(torch.stack(frames[:32], 1)) for frames in (mine, self.exact))
        error = (near - far).square().mean((1, 2, 3, 4))
        by_stream = [round(float(value), 2) for value in -10 * torch.log10(error.clamp_min(1e-10))]
        each = psnr(near, far)
        report = {"psnr_32": float(each.mean()), "psnr_at_32": float(each[:, -1].mean()), "psnr": by_stream}
        if self.long:
            halves = [images(torch.stack(frames[self.long // 2 : self.long : 4], 1)) for frames in (mine, self.exact)]
            report |= drift(*halves)
        return report


def drift(mine: torch.Tensor, exact: torch.Tensor) -> dict[str, Any]:
    """How the character of streams [N, T, 3, H, W] has changed."""
    changes = {}
    for measure in (contrast, colourfulness, sharpness, brightness):
        now, then = (float(measure(frames).mean()) for frames in (mine, exact))
        changes[measure.__name__] = now / then - 1
    colours = histogram_distance(colour_histogram(mine), colour_histogram(exact))
    return {"feature_drift": max(map(abs, changes.values())), "changes": changes, "colours": colours}


def brightness(image: torch.Tensor) -> torch.Tensor:
    """Mean of all channels per frame."""
    return image.mean((-3, -2, -1))


if __name__ == "__main__":
    main()
