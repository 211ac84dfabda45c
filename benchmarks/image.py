"""Token decoding at published sizes, random weights: pictures per second and latency by method and number of steps.

    python benchmarks/image.py [--out image.json] [--seconds 400] [--batch 64] [--sizes large,embedded] [--quick]

Prints one JSON object; times are seconds. Every method decodes 16 x 16 tokens from a vocabulary of 16,384 (VAR: its ten
scales, 680 tokens) with classifier-free guidance, so a batch of 64 pictures is 128 rows. Pixels are not decoded.

`large` is ARPG-L's size (320 M parameters) and its peers': LlamaGen-L for raster, the same layers for masked and next
scale. On CUDA a whole decoding is one CUDA graph, for raster too; `eager` starts every kernel by itself. Before a graph
is timed its tokens are compared with the eager ones: `as_eager` is the share that is the same.
`embedded` is the size of the emoji model, in float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from variants import describe, measure_all, publish

from millstream.models.token_config import Kind
from millstream.models.token_transformer import TokenTransformer
from millstream.pipelines.token_networks import CachedNetwork, MaskedNetwork, PhiloxDraws
from millstream.samplers import (
    Ask,
    Categorical,
    Level,
    Scales,
    TokenSampler,
    decode,
    decoding_levels,
    level_weights,
)
from millstream.samplers.levels import VAR_SIZES

SIDE = 16
GUIDANCE = 4.0
CHANNELS = 32  # of VAR's codes
COMPARED = ("random order, 64 steps", "raster", "raster, eager")  # by the goal


@dataclass(frozen=True)
class Size:
    """Of the layers; `prompt` tokens of width `text_dim`."""

    dim: int
    heads: int
    layers: int
    vocab: int
    prompt: int
    text_dim: int


SIZES = {
    "large": Size(dim=1024, heads=16, layers=24, vocab=16384, prompt=1, text_dim=1024),
    "embedded": Size(dim=192, heads=3, layers=6, vocab=1024, prompt=8, text_dim=112),
    "tiny": Size(dim=64, heads=1, layers=4, vocab=256, prompt=1, text_dim=32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the JSON here")
    parser.add_argument("--seconds", type=float, default=400, help="start no variant after this time")
    parser.add_argument("--batch", type=int, help="pictures at once (default: 64 on CUDA, 4 elsewhere)")
    parser.add_argument("--sizes", help=f"some of {','.join(SIZES)} (default: large,embedded on CUDA, else embedded)")
    parser.add_argument("--quick", action="store_true", help="only what the goal compares")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    batch = arguments.batch or (64 if cuda else 4)
    sizes: list[str] = str(arguments.sizes or ("large,embedded" if cuda else "embedded")).split(",")
    report: dict[str, Any] = {"command": " ".join(sys.argv), "device": describe(device)}
    free = torch.cuda.empty_cache if cuda else lambda: None
    variants = plan(sizes, device, batch)
    if arguments.quick:
        wanted = {f"{sizes[0]}: {name}" for name in COMPARED}
        variants = {name: run for name, run in variants.items() if name in wanted}
    report["variants"] = measure_all(variants, arguments.seconds, after=free)
    report["goal"] = goal(report["variants"])
    publish(report, arguments.out)


def plan(sizes: list[str], device: torch.device, batch: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured, the most important first."""
    graph = device.type == "cuda"
    variants: dict[str, Callable[[], dict[str, Any]]] = {}
    for size in sizes:
        run = partial(measure, SIZES[size], device)
        variants |= {
            f"{size}: random order, 64 steps": partial(run, "two_pass", 64, batch, graph=graph),
            f"{size}: raster": partial(run, "causal", SIDE * SIDE, batch, graph=graph),
            f"{size}: random order, 32 steps": partial(run, "two_pass", 32, batch, graph=graph),
            f"{size}: random order, 16 steps": partial(run, "two_pass", 16, batch, graph=graph),
            f"{size}: masked, 12 steps": partial(run, "masked", 12, batch, graph=graph),
            f"{size}: masked, 12 steps, delayed cache": partial(run, "masked", 12, batch, graph=graph, refresh=4),
            f"{size}: next scale, 10 steps": partial(run, "scales", len(VAR_SIZES), batch, graph=graph),
            f"{size}: random order, 64 steps, one picture": partial(run, "two_pass", 64, 1, graph=graph),
            f"{size}: raster, one picture": partial(run, "causal", SIDE * SIDE, 1, graph=graph),
        }
        if graph:
            variants[f"{size}: random order, 64 steps, eager"] = partial(run, "two_pass", 64, batch, graph=False)
            variants[f"{size}: raster, eager"] = partial(run, "causal", SIDE * SIDE, batch, graph=False)
    return variants


@torch.no_grad()
def measure(
    size: Size, device: torch.device, kind: Kind, steps: int, batch: int, *, graph: bool, refresh: int = 1
) -> dict[str, Any]:
    """Decode `batch` pictures a few times."""
    torch.manual_seed(0)
    model: Any = make_model(size, kind).eval()  # diffusers' `to` hides its signature from type checkers
    model = model.to(device)
    if device.type == "cuda" and size.dim >= 1024:
        model = model.to(torch.bfloat16)
    text = torch.randn(2 * batch, size.prompt, size.text_dim, device=device, dtype=model.dtype)
    seeds = torch.arange(batch, device=device)
    draw = make_draw(model, kind, steps, text, seeds, refresh)
    wanted, same = draw(), 1.0
    if graph:
        recorded, result = record(draw)
        recorded.replay()
        same = float((result == wanted).float().mean())
        draw = recorded.replay
    times = timed(draw, device)
    exact = wanted if refresh == 1 else make_draw(model, kind, steps, text, seeds, 1)()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "steps": steps,
        "batch": batch,
        "seconds": statistics.median(times),
        "pictures_per_second": batch / statistics.median(times),
        "runs": len(times),
        "as_eager": same,
        "same_tokens": float((wanted == exact).float().mean()),  # as without an approximate cache
    }


def make_model(size: Size, kind: Kind) -> TokenTransformer:
    """All kinds have the same number of layers; the two passes share them out evenly."""
    cross = size.layers // 2 if kind == "two_pass" else 0
    return TokenTransformer(
        kind=kind,
        vocab_size=size.vocab,
        grid=(SIDE, SIDE),
        dim=size.dim,
        num_heads=size.heads,
        ffn_dim=-(-size.dim * 8 // 3 // 64) * 64,
        num_layers=size.layers - cross,
        num_cross_layers=cross,
        text_dim=size.text_dim,
        scale_sides=VAR_SIZES if kind == "scales" else None,
        token_channels=CHANNELS if kind == "scales" else None,
    )


def make_draw(
    model: TokenTransformer, kind: Kind, steps: int, text: Tensor, seeds: Tensor, refresh: int
) -> Callable[[], Tensor]:
    """A whole decoding, from the prompt to the tokens."""
    batch, count, draws = len(seeds), SIDE * SIDE, PhiloxDraws(seeds)
    if kind == "scales":
        return partial(draw_scales, model, text, draws, batch)
    order = {"two_pass": "random", "masked": "masked", "causal": "raster"}[kind]
    given = TokenSampler(steps, order=order, guidance_scale=GUIDANCE).plan(count)  # type: ignore[arg-type]
    blank = torch.zeros(batch, count, dtype=torch.int64, device=text.device)

    def draw() -> Tensor:
        network = MaskedNetwork(model, text, refresh=refresh) if kind == "masked" else CachedNetwork(model, text)
        return decode(
            network,
            blank,
            blank.bool(),
            counts=given.counts,
            order=given.order,
            head=given.head,
            draws=draws,
            guidance=given.guidance,
        )

    return draw


def draw_scales(model: TokenTransformer, text: Tensor, draws: PhiloxDraws, batch: int) -> Tensor:
    """VAR with a random codebook; the convolution phi, a thousandth of the work, is left out."""
    cache = model.begin(text)
    vocab = model.config["vocab_size"]
    table = torch.sin(torch.arange(vocab * CHANNELS, device=text.device)).view(vocab, CHANNELS).to(text.dtype)

    def network(level: int, given: Tensor | None, ask: Ask) -> Tensor:
        return model.predict_scale(level, None if given is None else given.repeat(2, 1, 1), cache)

    levels = Scales(VAR_SIZES, lambda tokens: table[tokens], lambda level, x: x, table, CHANNELS)
    plan = [Level(Categorical())] * len(VAR_SIZES)
    weights = level_weights(GUIDANCE - 1, len(VAR_SIZES))
    done = decoding_levels(network, levels, plan, batch=batch, draws=draws, guidance=weights)
    return torch.cat([level.tokens for level in done], dim=1)


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
    """Three runs or more, for a few seconds."""
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 50):
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
