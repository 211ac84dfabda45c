"""Thirty seconds of sound by masked parallel decoding at SoundStorm's published size, random weights.

1,500 frames of 12 levels at 50 Hz: 16 passes for the first level and one for each other, 27 passes of a Conformer over
the whole clip. What bounds them is their matrix products; the report counts them, so that a time can be judged.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from image import record, timed
from torch import Tensor, nn

from millstream.kernels.fused import quantize_rows, quantized_linear
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
        "masked: 30 s, one graph, compiled, fp8 products": partial(measure, device, mode="default", fp8=True),
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
    fp8: bool = False,
) -> dict[str, Any]:
    """Draw clips a few times. `fp8`: products of the layers in 8 bits, which is not exact."""
    torch.manual_seed(0)
    with device:
        model = MaskedSoundTransformer(**(sizes or {})).eval()
    if device.type == "cuda":
        model = quiet(model, torch.bfloat16)
    condition = torch.randint(model.config["condition_size"], (batch, -(-frames // 2)), device=device)
    seeds = torch.arange(batch, device=device)
    draw = partial(draw_codes, model, frames, seeds, condition=condition, steps=(steps,))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    plain, exact = draw(), logits(model, frames, batch, condition)
    if fp8:
        in_eight_bits(model)
    with compiled(mode):
        wanted, rounded = draw(), logits(model, frames, batch, condition)
        times = timed(recorded(draw, wanted) if graph else draw, device)
    seconds, passes = statistics.median(times), steps + model.config["levels"] - 1
    work = passes * batch * tera_operations(model, frames)
    return {
        "parameters": parameters,
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
        "met": seconds < WANTED if (frames, batch, steps, fp8) == (FRAMES, 1, 16, False) else None,
        "same_codes_as_plain": float((wanted == plain).float().mean()),
        "logits_error_to_plain": float((rounded - exact).norm() / exact.norm()),
    }


@contextmanager
def compiled(mode: str | None) -> Iterator[None]:
    """Blocks are compiled on both sides of the attention, which keeps the kernel that the house chooses for it."""
    try:
        for name, part in PARTS.items():
            setattr(ConformerBlock, name, part if mode is None else torch.compile(part, dynamic=False, mode=mode))
        yield
    finally:
        for name, part in PARTS.items():
            setattr(ConformerBlock, name, part)


def recorded(draw: Callable[[], Tensor], wanted: Tensor) -> Callable[[], None]:
    """A whole drawing as one CUDA graph. Raises ValueError if it draws anything else than the eager run."""
    graph, result = record(draw)
    graph.replay()
    if not torch.equal(result, wanted):
        raise ValueError(f"the graph drew {int((result != wanted).sum())} other codes than the eager run")
    return graph.replay


def in_eight_bits(model: MaskedSoundTransformer) -> None:
    """Replace the products of the layers."""
    for block in list(model.layers.modules()):
        for name, part in list(block.named_children()):
            if isinstance(part, nn.Linear):
                setattr(block, name, EightBits(part))


class EightBits(nn.Module):
    """A linear layer whose products are taken in float8, with a scale per row of either side."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = quantize_rows(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.weight)


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
    dim, ffn = model.config["dim"], model.config["ffn_dim"]
    # Two feed-forwards; queries, keys, values and what is made of them; the convolution's gates and what follows.
    layers = model.config["num_layers"] * (4 * dim * ffn + 4 * dim * dim + 3 * dim * dim)
    head = dim * model.config["vocab_size"]
    attention = 2 * frames * dim * model.config["num_layers"]
    return 2 * frames * (layers + head + attention) / 1e12
