"""Every attention backend and planner in one run: time, TFLOP/s, density, error against float64; JSON and one plot.

    python benchmarks/attention.py --quick            # under 90 s on an H100
    python benchmarks/attention.py --world            # and errors on what the shipped world asks
    python benchmarks/attention.py --tune             # the kernel's tile sizes, for `choose_config`
    python benchmarks/attention.py --out results      # results/attention.json and results/attention.png

The shape is Wan 2.1 1.3B at 480x832: 21 latent frames of 30 x 52 tokens, 12 heads of 128. Inputs are (a) random and (b)
video-like: smooth over the grid, so that near tokens are alike. Errors are relative (Frobenius) and taken on sampled
queries. Speed-up is over the fastest dense SDPA of this run, plan making included. Nothing is timed unless the kernel
first agrees with float64.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from attention_cases import (
    DTYPE,
    Inputs,
    backends,
    clustered_inputs,
    flex_runs,
    plans,
    random_inputs,
    video_inputs,
    world_inputs,
)
from attention_report import Report, plot
from torch import Tensor

from millstream.kernels import BlockPlan, attend
from millstream.kernels.attention.float8 import attend_float8
from millstream.kernels.attention.turned import GRAIN, turn_values
from millstream.kernels.float8 import FLOAT8, to_float8
from millstream.kernels.planners import FlashBlock


def exact(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Dense attention of the sampled `rows` in float64, head by head: [rows, H, D]."""
    heads = []
    for head in range(q.shape[2]):
        scores = q[0, rows, head].double() @ k[0, :, head].double().T * q.shape[-1] ** -0.5
        heads.append(scores.softmax(-1) @ v[0, :, head].double())
    return torch.stack(heads, 1)


def median_ms(run: Callable[[], object], repeats: int, device: str) -> float:
    run()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The device waits a little, so that launching is not measured: in a stream it is done ahead, or by a graph.
            torch.cuda._sleep(4_000_000)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start_s = time.perf_counter()
            run()
            times.append((time.perf_counter() - start_s) * 1e3)
    return sorted(times)[len(times) // 2]


def gate(device: str) -> None:
    """The kernel against float64 on odd lengths, by FlashAttention's rule; raises before anything is timed."""
    for tokens in (63, 1000):
        generator = torch.Generator(device).manual_seed(3)
        q, k, v = (torch.randn((1, tokens, 2, 128), generator=generator, device=device).to(DTYPE) for _ in range(3))
        truth = exact(q, k, v, torch.arange(tokens, device=device))
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * 128**-0.5
        plain = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)[0]
        out = attend(q, k, v, BlockPlan.dense(tokens, tokens, (128, 128), device))[0]
        bound = 2 * (plain.double() - truth).abs().max() + 1e-3
        error = (out.double() - truth).abs().max()
        if not error <= bound:
            raise SystemExit(f"the kernel is wrong at {tokens} tokens: error {error:.2e}, bound {bound:.2e}; not timed")


def flops(q: Tensor, k: Tensor) -> float:
    return 4.0 * q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] * q.shape[3]


def measure(
    run: Callable[[], Tensor], q: Tensor, k: Tensor, truth: Tensor, rows: Tensor, repeats: int, device: str
) -> dict:
    """One row of the table for a run whose density is 1."""
    error = float((run()[0, rows].double() - truth).norm() / truth.norm())
    ms = median_ms(run, repeats, device)
    return {"ms": ms, "plan_ms": 0.0, "density": 1.0, "tflops": flops(q, k) / ms / 1e9, "error": error}


def measure_call(run: Callable[[], Tensor], repeats: int, device: str) -> dict:
    """Time alone, of what says nothing about its error here."""
    return {"ms": median_ms(run, repeats, device), "plan_ms": 0.0}


def measure_plan(
    planner: Callable,
    options: dict,
    inputs: Inputs,
    truth: Tensor,
    rows: Tensor,
    repeats: int,
    device: str,
    dense_ms: float,
) -> dict:
    """One row of the table for a planner; `dense_ms` is what its speed-up is over."""
    q, k, v = inputs
    plan = planner(q, k, v)
    density = plan.density()
    row = measure(lambda: attend(q, k, v, plan, **options), q, k, truth, rows, repeats, device)
    made = planner(q, k, v) is plan
    plan_ms = 0.0 if made else median_ms(lambda: planner(q, k, v), max(1, repeats // 2), device)
    speedup = dense_ms / (row["ms"] + plan_ms)
    row |= {"plan_ms": plan_ms, "density": density, "tflops": row["tflops"] * density, "speedup": speedup}
    # Of the time that a plan saves, what is spent on making it; above 1 it saves nothing.
    return row | ({"plan_share": plan_ms / (dense_ms - row["ms"])} if dense_ms > row["ms"] else {})


def reuse(heads: int, dim: int, device: str, repeats: int, chunk: int, context: int) -> dict:
    """Four denoising steps of one chunk against its context: attention in full, and with the outside part kept."""
    generator = torch.Generator(device).manual_seed(4)
    shapes = [(1, chunk, heads, dim), (1, chunk + context, heads, dim), (1, chunk + context, heads, dim)]
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(DTYPE) for shape in shapes)
    inside, outside = (k[:, context:], v[:, context:]), (k[:, :context], v[:, :context])
    cache = FlashBlock()

    def kept() -> None:
        for step in range(4):
            cache.attend(0, q, inside, outside, first=step == 0)

    def full() -> None:
        for _ in range(4):
            attend(q, k, v)

    full_ms, kept_ms = median_ms(full, repeats, device), median_ms(kept, repeats, device)
    return {"full_ms": full_ms, "ms": kept_ms, "speedup": full_ms / kept_ms}


def few_queries(heads: int, dim: int, device: str, repeats: int, queries: int, keys: int) -> dict:
    """One frame against a long context: the kernel splits the keys, for there are few tiles of queries."""
    generator = torch.Generator(device).manual_seed(5)
    shapes = [(1, queries, heads, dim), (1, keys, heads, dim), (1, keys, heads, dim)]
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(DTYPE) for shape in shapes)
    plan = BlockPlan.dense(queries, keys, (128, 128), device)
    dense_ms = median_ms(lambda: attend(q, k, v), repeats, device)
    ms = median_ms(lambda: attend(q, k, v, plan), repeats, device)
    return {"dense_ms": dense_ms, "ms": ms, "speedup": dense_ms / ms, "tflops": flops(q, k) / ms / 1e9}


def chunk_in_float8(heads: int, dim: int, device: str, repeats: int, queries: int, keys: int) -> dict:
    """A stream's chunk against keys and values that are kept in FP8, and what it takes to turn the chunk's values."""
    generator = torch.Generator(device).manual_seed(7)
    shapes = [(1, queries, heads, dim), (1, keys, heads, dim), (1, keys, heads, dim)]
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(DTYPE) for shape in shapes)
    turned = torch.zeros((1, heads, dim, -(-keys // GRAIN) * GRAIN), dtype=FLOAT8, device=device)
    turn_values(v, turned)
    narrow = to_float8(q), to_float8(k)
    rows = torch.linspace(0, queries - 1, min(queries, 256), device=device).round().long()
    truth = exact(q, k, v, rows)
    seen = attend_float8(*narrow, turned)[0][0, rows].double()
    dense_ms = median_ms(lambda: attend(q, k, v), repeats, device)
    ms = median_ms(lambda: attend_float8(*narrow, turned), repeats, device)
    return {
        "dense_ms": dense_ms,
        "ms": ms,
        "speedup": dense_ms / ms,
        "tflops": flops(q, k) / ms / 1e9,
        "error": float((seen - truth).norm() / truth.norm()),
        "turn_ms": median_ms(lambda: turn_values(v[:, :queries], turned), repeats, device),
    }


def tune(report: Report, heads: int, tokens: int, device: str) -> None:
    """The kernel's tile sizes, dense and sparse, each held to float64 before it is timed; then the best as JSON."""
    from attention_tune import best, candidates

    rows = []
    for candidate in candidates():
        row = report.add(candidate.name, partial(candidate.run, tokens, heads, median_ms, device))
        if row is not None:
            rows.append((candidate, row))
    report.data["best"] = best(rows)
    report.save()
    print(json.dumps(report.data["best"], indent=1))


# Planners that need no order of time among keys, for a ring has none.
WORLD = ("100 %", "PISA", "SVG-EAR", "dropped", "MoBA, ", "SpargeAttn", "ProxyAttn", "SVG 2")


def compare_world(report: Report, device: str) -> None:
    """Errors on what a trained model asks; its 768 keys are too few for times to mean much."""
    inputs, grid = world_inputs(device)
    q, k, v = inputs
    rows = torch.arange(q.shape[1], device=device)
    truth = exact(q, k, v, rows)
    dense = measure(lambda: attend(q, k, v), q, k, truth, rows, 3, device)
    for name, (planner, keywords) in plans(grid, q.shape[2], device).items():
        if any(part in name for part in WORLD):
            arguments = (planner, keywords, inputs, truth, rows, 3, device, dense["ms"])
            report.add(name, partial(measure_plan, *arguments), "world")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, stop after 85 seconds")
    parser.add_argument("--tune", action="store_true", help="time the kernel's tile sizes instead")
    parser.add_argument(
        "--world", action="store_true", help="also take queries, keys and values from the shipped world"
    )
    parser.add_argument("--only", default="", help="only names that contain one of these, separated by commas")
    parser.add_argument("--seconds", type=float, default=None, help="start no variant after this many seconds")
    parser.add_argument("--grid", default=None, help="frames,height,width (21,30,52; 4,12,20 without a GPU)")
    parser.add_argument("--heads", type=int, default=None)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid = tuple(map(int, (options.grid or ("21,30,52" if device == "cuda" else "4,12,20")).split(",")))
    heads = options.heads or (12 if device == "cuda" else 2)
    tokens = grid[0] * grid[1] * grid[2]
    limit = options.seconds or (85.0 if options.quick else 1e9)
    repeats = 1 if device == "cpu" else 5 if options.quick else 15
    wanted = [part for part in options.only.split(",") if part]
    report = Report(options.out, {"grid": grid, "tokens": tokens, "heads": heads, "dim": options.dim}, limit)
    print(json.dumps({key: report.data[key] for key in ("machine", "shape")}), flush=True)
    gate(device)
    print(f"the kernel agrees with float64  [{time.perf_counter() - report.began:.1f} s]", flush=True)
    if options.tune:
        tune(report, heads, tokens, device)
        return
    chunk = 3 * grid[1] * grid[2]
    shape = (heads, options.dim, device, repeats)
    for name, run in (
        ("reuse, 4 steps", lambda: reuse(*shape, chunk, 3 * chunk)),
        ("few queries", lambda: few_queries(*shape, chunk // 3, 4 * chunk)),
        ("chunk in FP8", lambda: chunk_in_float8(*shape, chunk, 4 * chunk)),
        ("chunk alone in FP8", lambda: chunk_in_float8(*shape, chunk, chunk)),
    ):
        if not wanted or any(part in name for part in wanted):
            report.add(name, run)
    compare(report, grid, heads, options.dim, device, repeats, wanted)
    if options.world:
        report.add("world", lambda: compare_world(report, device))
    report.add("plot", lambda: plot(report.data["results"], options.out / "attention.png"))
    print(json.dumps(report.data))


def compare(
    report: Report, grid: tuple[int, ...], heads: int, dim: int, device: str, repeats: int, wanted: list[str]
) -> None:
    """Backends and planners on both kinds of input."""

    def want(name: str) -> bool:
        return not wanted or name.startswith("dense") or any(part in name for part in wanted)

    tokens = grid[0] * grid[1] * grid[2]
    rows = torch.linspace(0, tokens - 1, min(tokens, 1024), device=device).round().long()
    kinds = {}
    for kind, make in (("video", video_inputs), ("clustered", clustered_inputs), ("random", random_inputs)):
        q, k, v = make(grid, heads, dim, device)
        kinds[kind] = ((q, k, v), exact(q, k, v, rows))
    planners = plans(grid, heads, device)
    for kind, (inputs, truth) in kinds.items():
        q, k, v = inputs
        dense_ms = 0.0
        for name, run in backends(tokens, heads, device).items():
            if want(name):
                call = partial(run, q, k, v)
                row = report.add(name, partial(measure, call, q, k, truth, rows, repeats, device), kind)
                if row and name.startswith("dense"):
                    dense_ms = min(dense_ms or row["ms"], row["ms"])
        for name, (planner, keywords) in planners.items():
            if want(name) and (kind != "clustered" or "15 %" in name):
                arguments = (planner, keywords, inputs, truth, rows, repeats, device, dense_ms)
                report.add(name, partial(measure_plan, *arguments), kind)
    q, k, v = kinds["video"][0]
    for name, run in flex_runs(tokens, heads, device).items() if want("flex") else ():
        report.add(name, partial(measure_call, partial(run, q, k, v), repeats, device), "video")


if __name__ == "__main__":
    sys.exit(main())
