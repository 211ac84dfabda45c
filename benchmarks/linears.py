"""The products of Wan 1.3B in bfloat16, int8 and FP8, one table: microseconds, quantising the input included.

    python benchmarks/linears.py [--out linears.json] [--seconds 40]

M is 4680, the tokens of three latent frames at 480 x 832. Times are medians of CUDA graph replays with inputs warm in
the cache; TFLOP/s in brackets. A column whose results are wrong says so instead. Below: each int8 product alone by
tiles (rows, columns, depth, warps, stages; "bulk": fetched by the copy engine; "n each": so many programs for each
multiprocessor, which take one tile after the other).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from fused import WRONG, draw, int_mm, measure, scaled_mm
from torch import Tensor
from torch.nn import functional as F

from millstream.kernels.fused import operators, quantize_rows
from millstream.kernels.fused.triton_linear import CANDIDATES, Tiles, quantized_product_triton

ROWS = 4680
SHAPES = ((1536, 1536), (1536, 4608), (1536, 8960), (8960, 1536))  # depth, columns


def columns_of(depth: int, columns: int) -> tuple[dict[str, Callable[[], Tensor]], Tensor, dict[str, Any]]:
    """The ways to multiply, the exact result, and the int8 product by tiles."""
    x, full, bias = draw(ROWS, depth), draw(columns, depth), draw(columns)
    whole, real = (quantize_rows(full, dtype)[:2] for dtype in (torch.int8, torch.float8_e4m3fn))
    rows = quantize_rows(x, torch.int8)[:2]

    def quantised(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return operators.quantize_rows(x, dtype, False)

    ways = {
        "bfloat16": lambda: F.linear(x, full, bias),
        "int8 (torch)": lambda: int_mm(*quantised(torch.int8), *whole, bias),
        "int8 (Triton)": lambda: operators.quantized_product(*quantised(torch.int8), *whole, bias, x.dtype),
        "FP8 (row scales)": lambda: scaled_mm(*quantised(torch.float8_e4m3fn), *real, bias),
        "quantise alone": lambda: quantised(torch.int8)[0],
    }
    tiles = {
        named(each): (lambda each=each: quantized_product_triton(*rows, *whole, bias, x.dtype, each))
        for each in CANDIDATES
    }
    return ways, F.linear(x.double(), full.double(), bias.double()), tiles


def named(tiles: Tiles) -> str:
    """Rows, columns, depth, warps and stages, and what else is so."""
    numbers = " ".join(str(part) for part in tiles[:5])
    return numbers + " bulk" * tiles.bulk + f" {tiles.resident} each" * (tiles.resident > 0)


def timed(way: Callable[[], Tensor], exact: Tensor | None) -> float | str:
    try:
        if exact is not None:
            error = float((way().double() - exact).norm() / exact.norm())
            if not error < WRONG:
                return f"wrong by {error:.2g}"
        return round(measure(way, ()), 1)
    except Exception as error:  # one way that cannot run must not cost the others their numbers
        return f"{type(error).__name__}: {error}"[:200]


def shown(value: float | str, depth: int, columns: int) -> str:
    return value[:24] if isinstance(value, str) else f"{value:.1f} ({2e-6 * ROWS * depth * columns / value:.0f})"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write JSON here, anew after each shape")
    parser.add_argument("--seconds", type=float, default=40.0, help="start nothing after so many")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark times CUDA kernels and found no CUDA device")
    end, torch.backends.cudnn.benchmark = time.monotonic() + options.seconds, True
    torch.manual_seed(0)
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "shapes": {}}
    for number, (depth, columns) in enumerate(SHAPES):
        name = f"{depth} to {columns}"
        ways, exact, tiles = columns_of(depth, columns)
        row: dict[str, Any] = {"tiles": {}}
        report["shapes"][name] = row
        if number == 0:
            print("| product | " + " | ".join(ways) + " |\n|" + " --- |" * (len(ways) + 1))
        for way, run in ways.items():
            late = time.monotonic() > end
            row[way] = "no time" if late else timed(run, None if way == "quantise alone" else exact)
        print(f"| {name} | " + " | ".join(shown(row[way], depth, columns) for way in ways) + " |", flush=True)
        for each, run in tiles.items():
            row["tiles"][each] = "no time" if time.monotonic() > end else timed(run, exact)
        if options.out:
            with open(options.out, "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1)
    print("\n| tiles | " + " | ".join(report["shapes"]) + " |\n|" + " --- |" * (len(SHAPES) + 1))
    for each in report["shapes"]["1536 to 1536"]["tiles"]:
        cells = [shown(report["shapes"][f"{d} to {c}"]["tiles"][each], d, c) for d, c in SHAPES]
        print(f"| {each} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
