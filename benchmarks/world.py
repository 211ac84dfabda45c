"""The shipped world on a GPU (or a CPU): frames per second, step times and memory, as sessions of a server see them.

    python benchmarks/world.py [--out world.json] [--seconds 85] [--frames 1000]

Prints one JSON object; times are milliseconds, memory is bytes. A step is `step_together` of all sessions with the
device synchronised, the prompt and keys changing now and then. `steady` begins when every ring is full.

variants: `eager` starts every kernel by itself, `graph` replays CUDA graphs (what a user gets), `compile` lets
torch.compile fuse the blocks first. A variant that fails, or for which no time is left, says so in its place.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from variants import describe, measure_all, publish
from world_ops import attention, decoder

import millstream as ms
from millstream.streaming import step_together
from millstream.streaming.graphs import Recordings
from millstream.streaming.kv_chunk import KVChunk

NEVER = 10**9
COMPILING = 30  # seconds that a variant with torch.compile takes longer
PROMPTS = ["a brick corridor with soldiers", "a green slime arena with medkits", "a grey stone maze on green slime"]
WALK = [{"KeyW"}] * 20 + [{"KeyW", "ArrowLeft"}] * 5 + [{"ArrowRight"}] * 10 + [set()] * 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the JSON here")
    parser.add_argument("--seconds", type=float, default=85, help="start no variant after this time")
    parser.add_argument("--frames", type=int, default=1000, help="frames of the main variants")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report: dict[str, Any] = {"command": " ".join(sys.argv), "device": describe(device)}
    report["variants"] = measure_all(
        plan(device, arguments.frames), arguments.seconds, reserve=lambda name: COMPILING if "compile" in name else 0
    )
    report["goals"] = goals(report["variants"])
    publish(report, arguments.out)


def plan(device: torch.device, frames: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured, the most important first."""
    if device.type == "cpu":
        few = min(frames, 100)
        return {
            "float32": partial(stream, device, frames=few),
            "float32, 4 sessions": partial(stream, device, sessions=4, frames=few // 2),
            "bfloat16": partial(stream, device, dtype=torch.bfloat16, frames=few),
            "parts": partial(parts, device),
        }
    half, third = frames // 2, frames // 3
    bf16 = torch.bfloat16
    return {
        "float32 graph": partial(stream, device, frames=frames),
        "bfloat16 graph": partial(stream, device, dtype=bf16, frames=frames),
        "float32 graph, 4 sessions": partial(stream, device, sessions=4, frames=half),
        "float32 graph, 16 sessions": partial(stream, device, sessions=16, frames=third),
        "parts float32": partial(parts, device),
        "float32 kernels": partial(kernels, device),
        "attention": partial(attention, device),
        "decoder": partial(decoder, device),
        "float32 eager": partial(stream, device, kind="eager", frames=min(frames, 100)),
        "float32 graph without warm-up": partial(stream, device, warm=False, frames=third),
        "bfloat16 compile + graph": partial(stream, device, kind="compile", dtype=bf16, frames=third),
        "bfloat16 graph, 4 sessions": partial(stream, device, dtype=bf16, sessions=4, frames=half),
        "bfloat16 graph, 16 sessions": partial(stream, device, dtype=bf16, sessions=16, frames=third),
        "float32 graph, 5000 frames": partial(stream, device, frames=5000),
        "parts bfloat16": partial(parts, device, dtype=bf16),
        "bfloat16 kernels": partial(kernels, device, dtype=bf16),
        "bfloat16 eager": partial(stream, device, kind="eager", dtype=bf16, frames=min(frames, 100)),
        "float32 compile + graph": partial(stream, device, kind="compile", frames=third),
    }


def world(device: torch.device, dtype: torch.dtype, kind: str = "graph") -> ms.WorldPipeline:
    pipe = ms.WorldPipeline.from_pretrained("freedoom", torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    if kind == "eager":
        pipe.arena.recordings = Recordings(device, patience=NEVER)
    if kind == "compile":
        torch._dynamo.reset()
        KVChunk.attend_view = torch.compiler.disable(KVChunk.attend_view)  # it differs from layer to layer
        pipe.transformer.compile_repeated_blocks()
    return pipe


def stream(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    kind: str = "graph",
    sessions: int = 1,
    frames: int,
    warm: bool = True,
) -> dict[str, Any]:
    """Sessions stepped together."""
    loading = time.perf_counter()
    pipe = world(device, dtype, kind)
    begun = time.perf_counter()
    if warm:
        pipe.warmup(sessions)
    warmed = time.perf_counter()
    streams = [
        pipe.stream(PROMPTS[number % 3], generator=torch.Generator().manual_seed(number)) for number in range(sessions)
    ]
    times, memory = [], {}
    for number in range(frames):
        for session in streams:
            session.steer(keys=WALK[number % len(WALK)])
        if number % 250 == 200:
            streams[0].steer(prompt=PROMPTS[number // 250 % 3])
        start = time.perf_counter()
        step_together(streams)  # waits for the device
        times.append(time.perf_counter() - start)
        if number in (100, frames - 1):
            memory[number] = used(device)
    steady = times[min(max(pipe.window.frames + 8, frames // 20), frames // 2) :]
    report = {
        "sessions": sessions,
        "frames": frames,
        "load_seconds": begun - loading,
        "warmup_seconds": warmed - begun,
        "first_frame": 1e3 * times[0],
        "all": spread(times),
        "steady": spread(steady),
        "steps_per_second": len(steady) / sum(steady),
        "frames_per_second": sessions * len(steady) / sum(steady),
        "recordings": len(pipe.arena.recordings),
        "memory": memory,
    }
    for session in streams:
        session.close()
    return report


def parts(device: torch.device, *, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Milliseconds of each part of a steady step of one session, synchronised; `host` is the time to start it."""
    pipe = world(device, dtype)
    pipe.warmup()
    session = pipe.stream(PROMPTS[0], generator=torch.Generator().manual_seed(0))
    for _ in range(pipe.window.frames + 4):
        session.step()
    state, control = session.state, session.control
    assert state is not None, "it has stepped"
    totals: dict[str, list[float]] = {}
    clock = partial(timed, totals, device)
    with torch.no_grad():
        for _ in range(50):
            actions = torch.zeros(1, 1, len(pipe.buttons), device=device, dtype=dtype)
            chunk = clock("open", pipe.arena.cache.open, [state.row])
            latents = clock("draw", pipe.draw, [state], chunk, actions, control)
            clock("remember", pipe.remember, [state], latents, chunk, actions)
            clock("decode", pipe.decode, latents)
            state.frame += 1
    report = {name: statistics.median(values) for name, values in totals.items()}
    whole = sum(report[name] for name in ("open", "draw", "remember", "decode"))
    return {**report, "sum": whole, "decode_share": report["decode"] / whole}


def timed(
    totals: dict[str, list[float]], device: torch.device, name: str, call: Callable[..., Any], *given: Any
) -> Any:
    start = time.perf_counter()
    result = call(*given)
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    totals.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
    totals.setdefault(f"{name} (host)", []).append(1e3 * (started - start))
    return result


def kernels(device: torch.device, *, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What the device does in a steady step: number of kernels, microseconds of the slowest kinds."""
    from torch.profiler import ProfilerActivity, profile

    pipe = world(device, dtype)
    pipe.warmup()
    session = pipe.stream(PROMPTS[0], generator=torch.Generator().manual_seed(0))
    for _ in range(pipe.window.frames + 4):
        session.step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(10):
            session.step()
    rows = [(row.self_device_time_total / 10, row.count / 10, row.key) for row in profiled.key_averages()]
    rows = sorted((row for row in rows if row[0] > 0), reverse=True)
    return {
        "kernels_per_step": sum(count for _, count, _ in rows),
        "busy_milliseconds_per_step": sum(spent for spent, _, _ in rows) / 1e3,
        "slowest": [f"{spent:.0f} us in {count:.0f} x {name[:90]}" for spent, count, name in rows[:24]],
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    ascending = sorted(1e3 * value for value in seconds)
    at = {f"p{n}": ascending[max(0, -(-n * len(ascending) // 100) - 1)] for n in (50, 95, 99)}
    return {**at, "max": ascending[-1], "p99 / p50": at["p99"] / at["p50"]}


def used(device: torch.device) -> dict[str, int]:
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cpu":
        return {"peak_resident": resident}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "device_used": total - free,
        "peak_resident": resident,
    }


def goals(variants: dict[str, Any]) -> dict[str, Any]:
    """The bars of this world, as far as they were measured."""
    one, four = variants.get("float32 graph", {}), variants.get("float32 graph, 4 sessions", {})
    if "steady" not in one:
        return {}
    wanted = {
        "300 frames/s": one["frames_per_second"],
        "p99 / p50 at most 1.2": one["steady"]["p99 / p50"],
    }
    if "steady" in four:
        wanted["4 sessions cost at most 2.2 times one"] = four["steady"]["p50"] / one["steady"]["p50"]
    return wanted


if __name__ == "__main__":
    main()
