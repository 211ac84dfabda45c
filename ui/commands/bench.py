"""`millstream bench`: how fast a world is drawn here, or how fast a text is spoken."""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..keys import KeyScript
from ..machine import machine, peak_memory, versions
from ..speech import MODEL as SPEECH
from ..world import attend_as, check_prompt, load_world, positive_integer
from .demo import PROMPTS, WALK
from .run import add_world_options

if TYPE_CHECKING:
    from ...pipelines.world import WorldPipeline

SENTENCE = "Hello there. This is how I sound when I read a line or two, on a machine such as yours."
SPEECH_NUMBERS = (
    *("time_to_first_sound", "real_time_factor", "underruns", "sound_seconds"),
    *("step_p50", "step_p95", "step_p99"),
)
WARM_UP = 20  # steps not counted: caches fill, kernels are compiled


def add(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "bench", help="measure frames per second (of --model speech, first sound), step times and memory here"
    )
    parser.add_argument("prompt", nargs="?", default=PROMPTS[0], help="default: %(default)s")
    parser.add_argument("--frames", type=positive_integer, default=200, help="frames to measure (default: 200)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_world_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    if is_speech(arguments.model):
        return run_speech(arguments)
    check_prompt(arguments.prompt)
    start = time.perf_counter()
    pipe = load_world(arguments.model, arguments.device)
    attend_as(pipe, arguments.attention)
    loading = time.perf_counter() - start
    report = {
        "command": "millstream bench",
        "model": arguments.model,
        "device": str(pipe.device),
        "load_seconds": loading,
        **measure(pipe, arguments.prompt, arguments.frames, steps=arguments.steps, seed=arguments.seed),
        "machine": machine(),
        "versions": versions(),
    }
    print(json.dumps(report, indent=2) if arguments.json else as_text(report))
    return 0


def measure(pipe: WorldPipeline, prompt: str, frames: int, *, steps: int | None, seed: int) -> dict[str, Any]:
    """Draw `frames` frames after a warm-up. All times are seconds, all memory bytes."""
    import torch

    keys = iter(KeyScript.parse(WALK, pipe.key_map))
    durations: list[float] = []
    drawn = 0
    generator = torch.Generator().manual_seed(seed)
    with pipe.stream(prompt, generator=generator, num_inference_steps=steps) as session:
        for held in islice(keys, WARM_UP):
            session.steer(keys=held)
            session.step()
        while drawn < frames:
            start = time.perf_counter()
            session.steer(keys=next(keys))
            drawn += sum(len(chunk.data) for chunk in session.step())
            durations.append(time.perf_counter() - start)
        first = session.metrics.time_to_first_frame
    durations.sort()
    on_gpu = pipe.device.type == "cuda"
    return {
        "frames": drawn,
        "frames_per_second": drawn / sum(durations),
        "native_rate": pipe.rate,
        "time_to_first_frame": first,
        "step_p50": percentile(durations, 50),
        "step_p95": percentile(durations, 95),
        "step_p99": percentile(durations, 99),
        "peak_memory": peak_memory(),
        "peak_accelerator_memory": torch.cuda.max_memory_allocated(pipe.device) if on_gpu else None,
    }


def is_speech(model: str) -> bool:
    """Is this a speaking model, by its name or its folder?"""
    index = Path(model).expanduser() / "model_index.json"
    known = index.is_file() and json.loads(index.read_text(encoding="utf-8")).get("_class_name") == "AudioPipeline"
    return model == SPEECH or known


def run_speech(arguments: argparse.Namespace) -> int:
    """Speak the prompt, or a text of our own, and print how it went."""
    import torch

    from ..speech import load_speech, told

    start = time.perf_counter()
    pipe = load_speech(arguments.model, arguments.device)
    loading = time.perf_counter() - start
    text = SENTENCE if arguments.prompt == PROMPTS[0] else arguments.prompt
    pipe(text, generator=torch.Generator().manual_seed(arguments.seed))
    with pipe.stream(text, generator=torch.Generator().manual_seed(arguments.seed)) as session:
        for chunk in session.chunks():
            session.metrics.delivered(chunk)
    metrics = session.metrics
    report = {
        "command": "millstream bench",
        "model": arguments.model,
        "device": str(pipe.device),
        "load_seconds": loading,
        **{name: metrics.as_dict()[name] for name in SPEECH_NUMBERS},
        "peak_memory": peak_memory(),
        "machine": machine(),
        "versions": versions(),
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"{arguments.model} on {pipe.device}: {told(metrics)}")
        print(f"loaded in {loading:.1f} s, {report['peak_memory'] / 1e6:.0f} MB at most, {metrics.sound_seconds:.1f} s")
    return 0


def percentile(ascending: list[float], percent: int) -> float:
    """Nearest rank, so that it is a step that was really seen."""
    return ascending[max(0, -(-percent * len(ascending) // 100) - 1)]


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    accelerator = report["peak_accelerator_memory"]
    lines = [
        f"{report['model']} on {report['device']}: {report['frames_per_second']:.1f} frames/s "
        f"(the world runs at {report['native_rate']:g})",
        "step        " + ", ".join(f"p{n} {1e3 * report[f'step_p{n}']:.1f} ms" for n in (50, 95, 99)),
        f"first frame {1e3 * report['time_to_first_frame']:.0f} ms after {report['load_seconds']:.1f} s of loading",
        f"memory      {report['peak_memory'] / 1e6:.0f} MB at most"
        + (f", {accelerator / 1e6:.0f} MB on the accelerator" if accelerator is not None else ""),
        f"on          {report['machine']['processor']}, {report['machine']['cores']} cores, "
        f"{report['machine']['threads']} threads, PyTorch {report['versions']['torch']}",
    ]
    return "\n".join(lines)
