"""Token decoding at published sizes, random weights: pictures per second and latency by method and number of steps.

    python benchmarks/image.py [--out image.json] [--seconds 900] [--batch 64] [--sizes large,embedded] [--quick]

Prints one JSON object; times are seconds. Every method decodes 16 x 16 tokens from a vocabulary of 16,384 (VAR: its ten
scales, 680 tokens; MAR and LINA: vectors of 16 channels by a flow head of 25 steps) with classifier-free guidance, so a
batch of 64 pictures is 128 rows. Pixels are not decoded.

`large` is ARPG-L's size (320 M parameters) and its peers': LlamaGen-L for raster, the same layers for masked, next
scale and M-VAR; VAR-d16's 16 adaptive layers; MAR-L's 32 layers and flow head, LINA with the same. On CUDA a whole
decoding is one CUDA graph, for raster too; `eager` starts every kernel by itself. Before a graph is timed its tokens
are compared with the eager ones: `as_eager` is the share that is the same; where it is not 1, `eager_again` is that
of a second eager decoding.

Beside them stand diffusers' own pipelines at their published sizes, as `image_peers.py` tells: DiT-XL/2 (675 M
parameters, and 75 M more in diffusers, which has an embedding of labels in every block) and amused-256 (603 M), as they
are and with their network under torch.compile(mode="reduce-overhead").
`embedded` is the size of the emoji model, in float32, without such peers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from image_methods import METHODS, SIZES, Method, Size, make_draw, make_parts
from image_peers import DIT, make_peer
from torch import Tensor
from variants import chosen, describe, measure_all, publish

COMPARED = ("random order, 64 steps", "raster", "raster, eager")  # by the goal
FIRST = ("random order, 64 steps", "raster")
COMPILING = 60.0  # seconds, before a compiled network draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the JSON here, anew after every variant")
    parser.add_argument("--seconds", type=float, default=900, help="start no variant after this time")
    parser.add_argument("--batch", type=int, help="pictures at once (default: 64 on CUDA, 4 elsewhere)")
    parser.add_argument("--sizes", help=f"some of {','.join(SIZES)} (default: large,embedded on CUDA, else embedded)")
    parser.add_argument("--quick", action="store_true", help="only what the goal compares")
    parser.add_argument("--only", help="variants whose name contains one of these, separated by semicolons")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    batch = arguments.batch or (64 if cuda else 4)
    sizes: list[str] = str(arguments.sizes or ("large,embedded" if cuda else "embedded")).split(",")
    report: dict[str, Any] = {"command": " ".join(sys.argv), "device": describe(device)}
    variants = plan(sizes, device, batch)
    if arguments.quick:
        wanted = {f"{sizes[0]}: {name}" for name in COMPARED}
        variants = {name: run for name, run in variants.items() if name in wanted}
    variants = chosen(variants, arguments.only)

    def keep(measured: dict[str, Any], *, printed: bool = False) -> None:
        publish({**report, "variants": measured, "goal": goal(measured)}, arguments.out, printed=printed)

    measured = measure_all(
        variants,
        arguments.seconds,
        reserve=lambda name: COMPILING if "compiled" in name else 0.0,
        after=free,
        keep=keep,
    )
    keep(measured, printed=True)


def free() -> None:
    """Give back what a variant held, graphs of compiled networks too."""
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def plan(sizes: list[str], device: torch.device, batch: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured, the most important first."""
    graph = device.type == "cuda"
    variants: dict[str, Callable[[], dict[str, Any]]] = {}
    for size in sizes:
        run = partial(measure, SIZES[size], device, graph=graph)
        ours = {f"{size}: {name}": partial(run, method, batch) for name, method in METHODS.items()}
        variants |= {name: ours[name] for name in (f"{size}: {first}" for first in FIRST)}
        if size in DIT:
            variants |= peers(size, device, batch)
        variants |= ours
        variants[f"{size}: masked, 12 steps, delayed cache"] = partial(
            run, METHODS["masked, 12 steps"], batch, refresh=4
        )
        for name in FIRST:
            variants[f"{size}: {name}, one picture"] = partial(run, METHODS[name], 1)
            if graph:
                variants[f"{size}: {name}, eager"] = partial(run, METHODS[name], batch, graph=False)
    return variants


def peers(size: str, device: torch.device, batch: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Diffusers' own pipelines."""
    variants = {}
    for compiled, how in ((False, ""), (True, ", compiled")):
        for name, steps in (("DiT", 20), ("DiT", 50), ("aMUSEd", 12)):
            run = partial(measure_peer, name, size, steps, batch, device, compiled=compiled)
            variants[f"{size}: diffusers {name}, {steps} steps{how}"] = run
    return variants


@torch.no_grad()
def measure(
    size: Size, device: torch.device, method: Method, batch: int, *, graph: bool, refresh: int = 1
) -> dict[str, Any]:
    """Decode `batch` pictures a few times."""
    parts, seeds = make_parts(size, method, device, batch), torch.arange(batch, device=device)
    draw = make_draw(parts, method, seeds, refresh)
    wanted, same = draw(), {"as_eager": 1.0}
    if graph:
        recorded, result = record(draw)
        recorded.replay()
        same["as_eager"] = float((result == wanted).float().mean())
        if same["as_eager"] < 1:  # is eager itself the same twice?
            same["eager_again"] = float((draw() == wanted).float().mean())
        draw = recorded.replay
    times = timed(draw, device)
    exact = wanted if refresh == 1 else make_draw(parts, method, seeds, 1)()
    return {
        **figures(parts.parameters, parts.model.dtype, method.steps, batch, times),
        **same,
        "same_tokens": float((wanted == exact).float().mean()),  # as without an approximate cache
    }


def measure_peer(
    name: str, size: str, steps: int, batch: int, device: torch.device, *, compiled: bool
) -> dict[str, Any]:
    """Call a diffusers pipeline a few times; the first two calls, which compile and record, are not counted."""
    draw, parameters = make_peer(name, size, steps, batch, device, compiled=compiled)
    start = time.perf_counter()
    for _ in range(2):
        draw()
    warm = time.perf_counter() - start
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {**figures(parameters, dtype, steps, batch, timed(draw, device)), "first_two_calls": warm}


def figures(parameters: int, dtype: torch.dtype, steps: int, batch: int, times: list[float]) -> dict[str, Any]:
    """What every variant tells."""
    return {
        "parameters": parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "steps": steps,
        "batch": batch,
        "seconds": statistics.median(times),
        "pictures_per_second": batch / statistics.median(times),
        "runs": len(times),
    }


def record(draw: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The whole decoding as one CUDA graph, and where its tokens will be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        draw()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = draw()
    return graph, result


def timed(draw: Callable[[], Any], device: torch.device, seconds: float = 6.0) -> list[float]:
    """Three runs or more, for a few seconds; fewer of what takes very long."""
    times: list[float] = []
    while (len(times) < 3 and sum(times) < 4 * seconds) or (sum(times) < seconds and len(times) < 50):
        start = time.perf_counter()
        draw()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def goal(variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Everything against raster of the same size in this run; 2.5 times is wanted of ARPG-L in 64 steps."""
    rates = {name: entry.get("pictures_per_second") for name, entry in variants.items()}
    found = {}
    for name, rate in rates.items():
        size = name.split(":")[0]
        raster = rates.get(f"{size}: raster")
        if rate and raster and name != f"{size}: raster" and "one picture" not in name:
            found[name] = {"times_raster": round(rate / raster, 2)}
    return {"wanted": {"large: random order, 64 steps": 2.5}, "measured": found}


if __name__ == "__main__":
    main()
