"""Thirty seconds of sound by masked parallel decoding at SoundStorm's published size, random weights.

1,500 frames of 12 levels at 50 Hz: 16 passes for the first level and one for each other, 27 passes of a Conformer over
the whole clip. What bounds them is their matrix products; the report counts them, so that a time can be judged.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from image import record, timed
from torch import Tensor

from millstream.models.conformer import ConformerBlock
from millstream.models.masked_sound import MaskedSoundTransformer
from millstream.pipelines.sound_tokens import draw_codes

FRAMES, SECONDS, WANTED = 1500, 30.0, 0.15
TINY = {"dim": 64, "num_heads": 2, "ffn_dim": 128, "num_layers": 2, "vocab_size": 64, "levels": 3}
COMPILED = {"default": 60.0, "max-autotune-no-cudagraphs": 240.0}  # seconds that compiling may take
PARTS = {name: getattr(ConformerBlock, name) for name in ("before", "after")}


def variants(device: torch.device) -> dict[str, Callable[[], dict[str, Any]]]:
    """The most important first; tiny on a CPU, to see that it runs."""
    if device.type != "cuda":
        return {"masked: tiny, 3 s": partial(measure, device, frames=150, sizes=TINY, graph=False)}
    return {
        "masked: 30 s, one graph, compiled": partial(measure, device, mode="default"),
        "masked: 30 s, one graph": partial(measure, device),
        "masked: 30 s, eager": partial(measure, device, graph=False),
        "masked: 30 s, one graph, autotuned": partial(measure, device, mode="max-autotune-no-cudagraphs"),
        "masked: 4 x 30 s, one graph, compiled": partial(measure, device, mode="default", batch=4),
        "masked: 30 s, 8 passes on the first level, one graph": partial(measure, device, steps=8),
    }


def reserve(name: str) -> float:
    """Seconds that a variant needs before it measures."""
    return COMPILED["max-autotune-no-cudagraphs"] if "autotuned" in name else 60.0 if "compiled" in name else 0.0


@torch.no_grad()
def measure(
    device: torch.device,
    *,
    frames: int = FRAMES,
    sizes: dict[str, int] | None = None,
    batch: int = 1,
    steps: int = 16,
    graph: bool = True,
    mode: str | None = None,
) -> dict[str, Any]:
    """Draw clips a few times."""
    torch.manual_seed(0)
    with device:
        model = MaskedSoundTransformer(**(sizes or {})).eval()
    if device.type == "cuda":
        model = quiet(model, torch.bfloat16)
    condition = torch.randint(model.config["condition_size"], (batch, -(-frames // 2)), device=device)
    seeds = torch.arange(batch, device=device)
    draw = partial(draw_codes, model, frames, seeds, condition=condition, steps=(steps,))
    plain, exact = draw(), logits(model, frames, batch, condition)
    try:
        if mode is not None:
            for name, part in PARTS.items():
                setattr(ConformerBlock, name, torch.compile(part, dynamic=False, mode=mode))
        wanted, rounded = draw(), logits(model, frames, batch, condition)
        run: Callable[[], Any] = draw
        if graph:
            recorded, result = record(draw)
            recorded.replay()
            if not torch.equal(result, wanted):
                raise ValueError(f"the graph drew {int((result != wanted).sum())} other codes than the eager run")
            run = recorded.replay
        times = timed(run, device)
    finally:
        for name, part in PARTS.items():
            setattr(ConformerBlock, name, part)
    seconds, passes = statistics.median(times), steps + model.config["levels"] - 1
    work = passes * batch * tera_operations(model, frames)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "frames": frames,
        "batch": batch,
        "passes": passes,
        "seconds": seconds,
        "fastest_seconds": min(times),
        "runs": len(times),
        "teraoperations": work,
        "teraoperations_per_second": work / seconds,
        "times_real_time": batch * frames / 50 / seconds,
        "met": seconds < WANTED if (frames, batch, steps) == (FRAMES, 1, 16) else None,
        "same_codes_as_uncompiled": float((wanted == plain).float().mean()),
        "logits_error_to_uncompiled": float((rounded - exact).norm() / exact.norm()),
    }


def quiet(model: Any, dtype: torch.dtype) -> Any:
    """The model in another dtype. torch.nn's own `to`: diffusers' warns of modules that should stay in float32."""
    return torch.nn.Module.to(model, dtype)


def logits(model: MaskedSoundTransformer, frames: int, batch: int, condition: Tensor) -> Tensor:
    """One pass over random codes, half of them known."""
    generator = torch.Generator(condition.device).manual_seed(1)
    shape = (batch, model.config["levels"], frames)
    codes = torch.randint(model.config["vocab_size"], shape, device=condition.device, generator=generator)
    known = torch.rand(batch, frames, device=condition.device, generator=generator) < 0.5
    return model(codes, known, 0, condition).float()


def tera_operations(model: MaskedSoundTransformer, frames: int) -> float:
    """Multiplications and additions of one pass over one clip, in 10^12: products with weights, and attention."""
    layers = sum(weight.numel() for weight in model.layers.parameters() if weight.ndim == 2)
    head = model.config["dim"] * model.config["vocab_size"]
    attention = 2 * frames * model.config["dim"] * model.config["num_layers"]
    return 2 * frames * (layers + head + attention) / 1e12
