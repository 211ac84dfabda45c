"""The kernel's tile sizes, timed on random block choices: what `choose_config` is set from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from attention_cases import DTYPE, chosen_blocks

from millstream.kernels import BlockPlan
from millstream.kernels.attention.launch import Config, attend_blocks
from millstream.kernels.attention.quantize import Quantize, quantize_attention
from millstream.kernels.attention.sparse import operands

DENSITIES = (1.0, 0.25, 0.1)  # one compilation serves all


@dataclass(frozen=True)
class Candidate:
    """Tiles of `config` for a head size, the blocks of a plan and a precision."""

    dim: int
    block: tuple[int, int]
    config: Config
    quantize: Quantize | None = None

    @property
    def name(self) -> str:
        config = self.config
        tiles = f"{config.tile_q}x{config.tile_k}, {config.warps} warps, {config.stages} stages"
        registers = f", {config.max_registers} registers" if config.max_registers else ""
        kind = self.quantize or "bf16"
        return f"D {self.dim}, blocks {self.block[0]}x{self.block[1]}, {kind}: tiles {tiles}{registers}"

    def run(self, tokens: int, heads: int, median_ms: Callable, device: str = "cuda") -> dict:
        """Milliseconds and TFLOP/s per density; quantising is not in them."""
        generator = torch.Generator(device).manual_seed(6)
        shape = (1, tokens, heads, self.dim)
        q, k, v = (torch.randn(shape, generator=generator, device=device).to(DTYPE) for _ in range(3))
        eight = None if self.quantize is None else quantize_attention(q, k, v, self.block, self.quantize)
        q, k, v = (q, k, v) if eight is None else (eight.q, eight.k, eight.v)
        row = {}
        for density in DENSITIES:
            visit = chosen_blocks(density, heads, -(-tokens // self.block[0]), device, -(-tokens // self.block[1]))
            plan = BlockPlan.of(visit, self.block, tokens).trimmed()
            given = operands(q, k, v, plan, None, self.dim**-0.5, eight, DTYPE)
            ms = median_ms(lambda given=given: attend_blocks(*given, config=self.config), 5, device)
            row[f"ms_{density:.0%}"] = ms
            row[f"tflops_{density:.0%}"] = 4.0 * tokens**2 * self.dim * heads * plan.density() / ms / 1e9
        return row


def candidates() -> Iterator[Candidate]:
    """The most telling first."""
    wide, half = (128, 128), (128, 64)
    yield Candidate(128, wide, Config(128, 64, 8, 3))
    yield Candidate(128, wide, Config(128, 128, 8, 3), "fp8")
    yield Candidate(128, wide, Config(64, 64, 4, 2))
    yield Candidate(128, wide, Config(128, 64, 8, 4), "fp8")
    yield Candidate(128, wide, Config(128, 128, 8, 2))
    yield Candidate(64, wide, Config(128, 128, 8, 3))
    yield Candidate(128, wide, Config(64, 128, 4, 2), "fp8")
    yield Candidate(64, wide, Config(128, 64, 8, 3))
    yield Candidate(128, (64, 64), Config(64, 64, 4, 2))
    yield Candidate(128, wide, Config(128, 128, 8, 3), "int8")
    yield Candidate(64, wide, Config(64, 128, 4, 3))
    yield Candidate(128, wide, Config(64, 64, 4, 3), "fp8")
    yield Candidate(128, half, Config(128, 64, 8, 3))
    yield Candidate(128, wide, Config(128, 64, 8, 4))
    yield Candidate(128, wide, Config(128, 64, 8, 2))
    yield Candidate(128, (64, 64), Config(64, 64, 4, 3))
    yield Candidate(128, wide, Config(128, 64, 8, 3), "int8")
