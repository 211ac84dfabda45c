"""Fused ops and linear attention against PyTorch, compiled and not, at the sizes of Wan 1.3B and of the shipped world.

    python benchmarks/fused.py [--ops elementwise] [--out fused.json] [--seconds 55]

Prints one JSON object, and each number as it comes to stderr. Every time is the median of CUDA graph replays, per call,
with inputs warm in the cache; every error is relative to float64. A variant that fails, or for which no time is left,
says so in its place.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from millstream.kernels import linear_attend, rotary_angles
from millstream.kernels.fused import operators, reference
from millstream.kernels.fused.triton_linear import quantized_product_triton
from millstream.kernels.linear_attention import reference as linear_reference

CALLS = 20  # of one graph
REPLAYS = 11
EPS = 1e-6
WRONG = 0.06  # 8-bit products are within 0.04
# name: rows, frames, tokens per frame, heads, head size, width of the feed-forward layer
SIZES = {
    "wan 1.3B, 3 frames": (1, 3, 1560, 12, 128, 8960),
    "world, 1 frame": (1, 1, 48, 4, 64, 896),
    "wan 1.3B, 1 frame": (1, 1, 1560, 12, 128, 8960),
    "world, 8 rows": (8, 1, 48, 4, 64, 896),
}


class Case(NamedTuple):
    """One op at one size: what to run, each on `arguments`, and the result in float64."""

    op: str
    size: str
    arguments: tuple[Any, ...]
    exact: Tensor
    variants: dict[str, Callable[..., Tensor]]
    compiled: dict[str, Callable[..., Tensor]]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def elementwise(size: str) -> Iterator[Case]:
    rows, frames, tokens, heads, dim, _ = SIZES[size]
    width, length = heads * dim, frames * tokens
    x, y, weight = draw(rows, length, width), draw(rows, length, width), draw(width)
    shift, scale, gate = draw(rows, frames, 3, width, dtype=torch.float32).unbind(2)
    cos, sin = rotary_angles(torch.arange(frames, device="cuda"), 1, tokens, dim)
    plain = reference.norm_rotary_reference
    arguments = (x, weight, cos, sin, heads, EPS, None, x.dtype)
    exact = plain(x.double(), weight.double(), *arguments[2:-1], torch.float64)
    yield Case("norm_rotary", size, arguments, exact, {"triton": operators.norm_rotary, "eager": plain}, {"": plain})
    plain = reference.norm_modulate_reference
    arguments = (x, shift, scale, None, None, EPS)
    exact = plain(x.double(), *arguments[1:])

    def fast(*arguments: Any) -> Tensor:
        return operators.norm_modulate(*arguments, None)[0]

    yield Case("norm_modulate", size, arguments, exact, {"triton": fast, "eager": plain}, {"": plain})
    plain = reference.gate_residual_reference
    exact = plain(x.double(), y, gate)
    variants = {"triton": operators.gate_residual, "eager": plain}
    yield Case("gate_residual", size, (x, y, gate), exact, variants, {"": plain})


def quantised(size: str, dtype: torch.dtype) -> Iterator[Case]:
    """Both layers of the feed-forward part; the errors are those of 8 bits against the unquantised layer."""
    rows, frames, tokens, heads, dim, hidden = SIZES[size]
    for depth, columns in ((heads * dim, hidden), (hidden, heads * dim)):
        x, full, bias = draw(rows * frames * tokens, depth), draw(columns, depth), draw(columns)
        weight, weight_scale = operators.quantize_rows(full, dtype, False)
        product = scaled_mm if dtype == torch.float8_e4m3fn else int_mm
        rows_of_x = operators.quantize_rows(x, dtype, False)
        constants = (weight, weight_scale, bias)

        def chosen(x: Tensor, *constants: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return operators.quantized_product(*operators.quantize_rows(x, dtype, False), *constants, x.dtype)

        def mixed(x: Tensor, *constants: Tensor, dtype: torch.dtype = dtype, product=product) -> Tensor:
            return product(*operators.quantize_rows(x, dtype, False), *constants)

        def in_torch(x: Tensor, *constants: Tensor, dtype: torch.dtype = dtype, product=product) -> Tensor:
            return product(*reference.quantize_rows_reference(x, dtype), *constants)

        variants = {
            "bfloat16": lambda x, *_, full=full, bias=bias: F.linear(x, full, bias),
            "millstream": chosen,
            "triton quantise, torch product": mixed,
            "triton product alone": lambda x, *c, q=rows_of_x: quantized_product_triton(*q, *c, x.dtype),
            "torch product alone": lambda x, *c, q=rows_of_x, product=product: product(*q, *c),
        }
        exact = F.linear(x.double(), full.double(), bias.double())
        name = f"{size}, {depth} to {columns}"
        yield Case(f"linear {str(dtype)[6:]}", name, (x, *constants), exact, variants, {"": in_torch})


def scaled_mm(values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    return torch._scaled_mm(
        values, weight.t(), scale, weight_scale.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def int_mm(values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    return (torch._int_mm(values, weight.t()) * scale * weight_scale.t() + bias).bfloat16()


def linear_attention(size: str) -> Iterator[Case]:
    rows, frames, tokens, heads, dim, _ = SIZES[size]
    length = frames * tokens
    q, k, v = (draw(rows, length, heads, dim) for _ in range(3))
    decay = torch.linspace(0.9, 1.0, heads, device="cuda")
    state = torch.zeros(rows, heads, dim, dim, device="cuda")
    for block in {length, tokens, 1}:
        g = decay.log().expand(rows, length // block, heads).unsqueeze(-1)
        wide = [x.double() for x in (q, k, v, g, state)]
        exact, _ = (linear_reference.recurrent if block > 1 else linear_reference.chunked)(*wide, block)

        def triton(q: Tensor, k: Tensor, v: Tensor, block: int = block) -> Tensor:
            return linear_attend(q, k, v, block=block, decay=decay)[0]

        def eager(q: Tensor, k: Tensor, v: Tensor, block: int = block, g: Tensor = g) -> Tensor:
            return linear_reference.recurrent(q, k, v, g, state, block)[0].to(v.dtype)

        variants: dict[str, Callable[..., Tensor]] = {"triton": triton}
        if block > 1:  # by token it is thousands of launches
            variants["eager"] = eager
        if block == length:
            window = [x.repeat(1, 4, 1, 1) for x in (k, v)]
            variants["softmax attention, the same keys"] = softmax
            variants["softmax attention, four times the keys"] = lambda q, *_, window=window: softmax(q, *window)
        yield Case("linear_attend", f"{size}, blocks of {block}", (q, k, v), exact, variants, {})


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def measure(run: Callable[..., Tensor], arguments: tuple[Any, ...]) -> float:
    """Microseconds per call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run(*arguments)
    times = []
    for _ in range(REPLAYS + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / CALLS)
    return statistics.median(times[2:])


def report(case: Case, name: str, run: Callable[..., Tensor], deadline: float) -> dict[str, Any]:
    result: dict[str, Any] = {"op": case.op, "size": case.size, "variant": name}
    if time.monotonic() > deadline:
        return result | {"skipped": "no time left"}
    try:
        if not name.startswith("softmax"):  # which is another function
            error = float((run(*case.arguments).double() - case.exact).norm() / case.exact.norm())
            result["relative_error"] = error
            if not error < WRONG:
                return result | {"failed": "wrong numbers are not timed"}
        result["microseconds"] = round(measure(run, case.arguments), 2)
    except Exception as error:  # one variant that cannot run must not cost the others their numbers
        result |= {"failed": f"{type(error).__name__}: {error}"[:300]}
    return result


def builders() -> Iterator[tuple[str, str, Callable[[], Iterator[Case]]]]:
    """What to measure: an op, a size, and what makes its cases."""
    for size in SIZES:
        yield "elementwise", size, partial(elementwise, size)
    for size in SIZES:
        yield "linear_attend", size, partial(linear_attention, size)
    for dtype in (torch.float8_e4m3fn, torch.int8):
        for size in list(SIZES)[:3]:
            yield f"linear {str(dtype)[6:]}", size, partial(quantised, size, dtype)


def run_all(deadline: float, ops: Sequence[str]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []

    def add(result: dict[str, Any]) -> None:
        results.append(result)
        print(json.dumps(result), file=sys.stderr, flush=True)  # what is known stays known if the machine is taken away

    waiting = []
    for op, size, build in builders():  # what is quick first, so that a slow compiler costs only its own numbers
        if not any(name in op for name in ops):
            continue
        try:
            for case in build():
                for name, run in case.variants.items():
                    add(report(case, name, run, deadline))
                waiting += [(case, run) for run in case.compiled.values()]
        except Exception as error:  # nor must one op that can't be set up cost the others theirs
            add({"op": op, "size": size, "failed": f"{type(error).__name__}: {error}"[:300]})
    for case, run in waiting:
        add(report(case, "torch.compile", torch.compile(run, dynamic=False), deadline))
    return sorted(results, key=lambda result: (result["op"], result["size"]))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="also write the JSON here")
    parser.add_argument(
        "--ops", nargs="+", default=[""], help="elementwise, linear_attend, float8 or int8; all if left out"
    )
    parser.add_argument("--seconds", type=float, default=55.0, help="start no variant after so many")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark times CUDA kernels and found no CUDA device")
    start = time.monotonic()
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # one function is compiled once per size
    results = run_all(start + options.seconds, options.ops)
    text = json.dumps(
        {
            "machine": {"gpu": torch.cuda.get_device_name(), "python": platform.python_version()},
            "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
            "seconds": round(time.monotonic() - start, 1),
            "results": results,
        },
        indent=1,
    )
    print(text)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
