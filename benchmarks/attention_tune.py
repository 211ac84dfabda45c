"""The kernel's tile sizes, timed on random block choices: what `choose_config` is set from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import zip_longest

import torch
from attention_cases import DTYPE, Inputs, chosen_blocks
from torch import Tensor

from millstream.kernels import BlockPlan
from millstream.kernels.attention.launch import Config, attend_blocks
from millstream.kernels.attention.quantize import Quantize, quantize_attention
from millstream.kernels.attention.sparse import operands

DENSITIES = (1.0, 0.25, 0.1)  # one compilation serves all
LARGEST_ERROR = {"bf16": 0.01, "int8": 0.03, "fp8": 0.12}  # relative, of float64; the bounds of the GPU tests


@dataclass(frozen=True)
class Case:
    """The same inputs and the same choice of blocks for every candidate that they fit."""

    dim: int
    block: tuple[int, int]
    tokens: int
    heads: int
    device: str

    def inputs(self) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(6)
        shape = (1, self.tokens, self.heads, self.dim)
        q, k, v = (torch.randn(shape, generator=generator, device=self.device).to(DTYPE) for _ in range(3))
        return q, k, v

    def visit(self, density: float) -> Tensor:
        blocks = [-(-self.tokens // size) for size in self.block]
        return chosen_blocks(density, self.heads, blocks[0], self.device, blocks[1])

    @property
    def rows(self) -> Tensor:
        return torch.linspace(0, self.tokens - 1, 256, device=self.device).round().long()


@cache
def truth(case: Case, density: float) -> Tensor:
    """Attention of the sampled queries over the chosen blocks in float64, [rows, H, D]."""
    q, k, v = case.inputs()
    visit, heads = case.visit(density), []
    for head in range(case.heads):
        scores = q[0, case.rows, head].double() @ k[0, :, head].double().T * case.dim**-0.5
        seen = visit[0, head, case.rows // case.block[0]].repeat_interleave(case.block[1], -1)[:, : case.tokens]
        heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[0, :, head].double())
    return torch.stack(heads, 1)


@dataclass(frozen=True)
class Candidate:
    """Tiles of `config` for a head size, the blocks of a plan and a precision."""

    dim: int
    block: tuple[int, int]
    config: Config
    quantize: Quantize | None = None

    @property
    def kind(self) -> str:
        return self.quantize or "bf16"

    @property
    def name(self) -> str:
        config = self.config
        tiles = f"{config.tile_q}x{config.tile_k}, {config.warps} warps, {config.stages} stages"
        ahead = ", ahead" if config.ahead else ""
        return f"D {self.dim}, blocks {self.block[0]}x{self.block[1]}, {self.kind}: tiles {tiles}{ahead}"

    def run(self, tokens: int, heads: int, median_ms: Callable, device: str = "cuda") -> dict:
        """Milliseconds, TFLOP/s and error per density; quantising is not in them. Nothing wrong is timed."""
        case = Case(self.dim, self.block, tokens, heads, device)
        q, k, v = case.inputs()
        eight = None if self.quantize is None else quantize_attention(q, k, v, self.block, self.quantize)
        q, k, v = (q, k, v) if eight is None else (eight.q, eight.k, eight.v)
        row = {}
        for density in DENSITIES:
            plan = BlockPlan.of(case.visit(density), self.block, tokens).trimmed()
            given = operands(q, k, v, plan, None, self.dim**-0.5, eight, DTYPE)

            def call(given: tuple = given) -> Tensor:
                return attend_blocks(*given, config=self.config)[0]

            expected = truth(case, density)
            error = float((call()[0, case.rows].double() - expected).norm() / expected.norm())
            if not error <= LARGEST_ERROR[self.kind]:
                raise ValueError(f"wrong at {density:.0%}: error {error:.2e}, bound {LARGEST_ERROR[self.kind]:.2e}")
            ms = median_ms(call, 5, device)
            row[f"ms_{density:.0%}"], row[f"error_{density:.0%}"] = ms, error
            row[f"tflops_{density:.0%}"] = 4.0 * tokens**2 * self.dim * heads * plan.density() / ms / 1e9
        return row


def best(results: list[tuple[Candidate, dict]]) -> dict[str, dict]:
    """The fastest tiles for each head size, block size, precision and density."""
    found: dict[str, dict] = {}
    for candidate, row in results:
        for density in DENSITIES:
            key = f"D {candidate.dim}, {candidate.block[0]}x{candidate.block[1]}, {candidate.kind}, {density:.0%}"
            ms = row[f"ms_{density:.0%}"]
            if key not in found or ms < found[key]["ms"]:
                found[key] = {"ms": ms, **asdict(candidate.config)}
    return found


def candidates() -> Iterator[Candidate]:
    """The most telling first: precisions take turns, each with and without `ahead`."""
    wide = (128, 128)
    bf16 = [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (128, 128, 8, 3), (128, 64, 8, 2), (64, 128, 4, 2)]
    fp8 = [(64, 128, 4, 2), (64, 128, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3)]
    int8 = [(64, 128, 4, 2), (128, 128, 8, 2), (64, 128, 4, 3)]
    for tiles in zip_longest(bf16, fp8, int8):
        for tile, quantize in zip(tiles, (None, "fp8", "int8")):
            if tile is not None:
                yield Candidate(128, wide, Config(*tile), quantize)
                yield Candidate(128, wide, replace(Config(*tile), ahead=False), quantize)
    for ahead in (True, False):
        yield Candidate(128, (64, 64), Config(64, 64, 4, 2, ahead=ahead))
        yield Candidate(64, wide, Config(128, 128, 8, 3, ahead=ahead))
    yield Candidate(128, (64, 64), Config(64, 64, 4, 3))
    yield Candidate(64, wide, Config(64, 128, 4, 3))
    yield Candidate(128, wide, Config(128, 64, 4, 3))
