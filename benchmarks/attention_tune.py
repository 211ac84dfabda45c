"""The kernel's tile sizes, timed on random block choices: what `choose_config` is set from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from attention_cases import DTYPE, chosen_blocks

from millstream.kernels import BlockPlan
from millstream.kernels.attention.launch import Config, attend_blocks
from millstream.kernels.attention.sparse import operands


def candidates() -> Iterator[tuple[int, tuple[int, int], float, Config]]:
    """(head size, block, density, config), the likeliest first."""
    for density in (1.0, 0.25):
        for config in (
            Config(128, 64, 8, 3),
            Config(128, 64, 8, 2),
            Config(128, 128, 8, 2),
            Config(128, 64, 8, 4),
            Config(128, 64, 4, 2),
            Config(64, 64, 4, 2),
            Config(64, 64, 4, 3),
        ):
            yield 128, (128, 128), density, config
    for config in (Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(64, 64, 8, 3)):
        yield 128, (64, 64), 0.25, config
    for config in (Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(128, 128, 4, 3), Config(128, 64, 4, 3)):
        yield 64, (128, 128), 1.0, config


def run_candidate(
    tokens: int, heads: int, dim: int, block: tuple[int, int], density: float, config: Config, median_ms: Callable
) -> dict:
    generator = torch.Generator("cuda").manual_seed(6)
    q, k, v = (torch.randn((1, tokens, heads, dim), generator=generator, device="cuda").to(DTYPE) for _ in range(3))
    visit = chosen_blocks(density, heads, -(-tokens // block[0]), "cuda")
    plan = BlockPlan.of(visit, block, tokens).trimmed()
    given = operands(q, k, v, plan, None, dim**-0.5)
    ms = median_ms(lambda: attend_blocks(*given, config=config), 7, "cuda")
    return {"ms": ms, "tflops": 4.0 * tokens**2 * dim * heads * density / ms / 1e9}
