"""What `benchmarks/attention.py` measures: inputs, dense backends, and a plan of every planner."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from millstream.kernels import BlockPlan, attend
from millstream.kernels import planners as P
from millstream.kernels.planners.scores import top_k

Inputs = tuple[Tensor, Tensor, Tensor]
DTYPE = torch.bfloat16


def random_inputs(grid: tuple[int, ...], heads: int, dim: int, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, grid[0] * grid[1] * grid[2], heads, dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(DTYPE) for _ in range(3))
    return q, k, v


def clustered_inputs(grid: tuple[int, ...], heads: int, dim: int, device: str) -> Inputs:
    """Runs of 64 tokens share a key and a value up to noise, and queries favour none: dropping costs most here."""
    generator = torch.Generator(device).manual_seed(7)
    tokens = grid[0] * grid[1] * grid[2]

    def draw(count: int) -> Tensor:
        return torch.randn((1, count, heads, dim), generator=generator, device=device)

    def clusters() -> Tensor:
        return draw(-(-tokens // 64)).repeat_interleave(64, 1)[:, :tokens] + 0.4 * draw(tokens)

    return draw(tokens).to(DTYPE), clusters().to(DTYPE), clusters().to(DTYPE)


def video_inputs(grid: tuple[int, ...], heads: int, dim: int, device: str) -> Inputs:
    """Queries and keys share a field that is smooth over the grid (correlated over about 4 tokens), values another."""
    generator = torch.Generator(device).manual_seed(1)
    coarse = [max(2, -(-n // 4)) for n in grid]

    def field() -> Tensor:
        noise = torch.randn((heads, dim, *coarse), generator=generator, device=device)
        smooth = torch.nn.functional.interpolate(noise, size=grid, mode="trilinear", align_corners=True)
        smooth = smooth / smooth.std()
        return smooth.flatten(2).permute(2, 0, 1)[None]

    def noise() -> Tensor:
        return torch.randn((1, grid[0] * grid[1] * grid[2], heads, dim), generator=generator, device=device)

    shared, values = field(), field()
    q, k, v = 1.2 * shared + 0.4 * noise(), 1.2 * shared + 0.4 * noise(), values + 0.2 * noise()
    q, k, v = (x.to(DTYPE).contiguous() for x in (q, k, v))
    return q, k, v


def world_inputs(device: str, layer: int = -1) -> tuple[Inputs, tuple[int, ...]]:
    """What the shipped world asks while walking: the queries of its last 16 frames, against its window; and their grid.

    Taken from one layer at the pass that commits each frame. Keys are in the order of the cache's ring.
    """
    import millstream as ms
    from millstream.models import block
    from millstream.streaming.types import WorldControl

    pipe = ms.WorldPipeline.from_pretrained("freedoom").to(device)
    calls: list[Inputs] = []
    original = block.attend

    def listen(q: Tensor, k: Tensor, v: Tensor, *args, **options) -> Tensor:
        if k.shape[1] >= q.shape[1]:  # not the prompt's few keys
            calls.append((q.clone(), k.clone(), v.clone()))
        return original(q, k, v, *args, **options)

    control = WorldControl(prompt="a brown stone room under a grid ceiling", keys=frozenset({"KeyW", "ArrowLeft"}))
    session = ms.Session(pipe, control)
    frames: list[Inputs] = []
    block.attend = listen
    try:
        for _ in range(40):
            calls.clear()
            session.step()
            frames.append(calls[layer])
    finally:
        block.attend = original
    _, k, v = frames[-1]
    count = k.shape[1] // frames[-1][0].shape[1]
    q = torch.cat([q for q, _, _ in frames[-count:]], 1)
    return (q.to(DTYPE), k.to(DTYPE), v.to(DTYPE)), (count, 6, q.shape[1] // count // 6)


def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attend(q, k, v)

    return run


@cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(visit: Tensor, block: int, tokens: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled FlexAttention over the same blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    count = visit.sum(-1).to(torch.int32)
    order = visit.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    none = torch.zeros_like(count)
    mask = BlockMask.from_kv_blocks(
        none, torch.zeros_like(order), count, order, BLOCK_SIZE=block, seq_lengths=(tokens, tokens)
    )
    compiled = _compiled_flex()
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)


def chosen_blocks(density: float, heads: int, blocks: int, device: str, key_blocks: int = 0) -> Tensor:
    key_blocks = key_blocks or blocks
    scores = torch.rand((1, heads, blocks, key_blocks), generator=torch.Generator(device).manual_seed(2), device=device)
    return top_k(scores, max(1, round(density * key_blocks)))


def backends(tokens: int, heads: int, device: str) -> dict[str, Callable]:
    """name: (q, k, v) -> attention without a plan."""
    if device == "cpu":
        return {"dense: SDPA": attend}
    return {
        "dense: cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
        "dense: flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "dense: attend": attend,
        "dense: attend with LSE": lambda q, k, v: attend(q, k, v, return_lse=True)[0],
    }


def flex_runs(tokens: int, heads: int, device: str) -> dict[str, Callable]:
    """FlexAttention over the blocks of the rows "kernel ..."; its compiler is slow, so these come last."""
    blocks = -(-tokens // 128)
    return {
        f"flex {density:.0%}".replace("%", " %"): flex(chosen_blocks(density, heads, blocks, device), 128, tokens)
        for density in (0.25, 0.1, 0.5, 1.0)
    }


def plans(grid: tuple[int, ...], heads: int, device: str) -> dict[str, tuple[Callable, dict]]:
    """name: (planner of (q, k, v), keywords of attend). Static planners ignore their arguments and are made once."""
    tokens = grid[0] * grid[1] * grid[2]
    blocks = -(-tokens // 128)

    def fixed(make: Callable[[], BlockPlan]) -> Callable:
        made: list[BlockPlan] = []

        def planner(*_: Tensor) -> BlockPlan:
            if not made:
                made.append(make())
            return made[0]

        return planner

    def at(density: float) -> Callable:
        visit = chosen_blocks(density, heads, blocks, device)
        return fixed(lambda: BlockPlan.of(visit, (128, 128), tokens).trimmed())

    dense = fixed(lambda: BlockPlan.dense(tokens, tokens, (128, 128), device))
    near = [max(1, round(n * 0.4)) for n in grid]
    tiling = P.tile_grid(grid, device=device)
    tile = [min(n, t) for n, t in zip(grid, (6, 8, 8))]
    tiles = [max(1, round(-(-n // t) * 0.5)) | 1 for n, t in zip(grid, tile)]
    streaming = torch.arange(heads, device=device) % 2 == 0
    return {
        "kernel 100 %": (dense, {}),
        "kernel 50 %": (at(0.5), {}),
        "kernel 25 %": (at(0.25), {}),
        "kernel 10 %": (at(0.1), {}),
        "FP8 100 %": (dense, {"quantize": "fp8"}),
        "INT8 100 %": (dense, {"quantize": "int8"}),
        "FP8 25 %": (at(0.25), {"quantize": "fp8"}),
        "PISA 15 %": (lambda q, k, v: P.pisa(q, k, v), {}),
        "PISA 15 %, first order": (lambda q, k, v: P.pisa(q, k, v, first_order=True), {}),
        "PISA 15 %, blocks 128": (lambda q, k, v: P.pisa(q, k, v, block=128), {}),
        "dropped 15 %": (lambda q, k, v: dropping(P.pisa(q, k, v)), {}),
        "SVG-EAR 15 %": (lambda q, k, v: P.svg_ear(q, k, v), {}),
        "window (GNA)": (fixed(lambda: P.window(grid, near, device=device)), {}),
        "window, stride = tile": (fixed(lambda: aligned_window(grid, device)), {}),
        "sliding tile": (fixed(lambda: P.sliding_tile(grid, tiles, tile=tile, device=device)), {}),
        "radial": (fixed(lambda: P.radial(grid[0], grid[1] * grid[2], device=device)), {}),
        "spatial": (fixed(lambda: P.spatial(grid, device=device)), {}),
        "temporal": (fixed(lambda: P.temporal(grid, device=device)), {}),
        "VMoBA": (lambda q, k, v: P.vmoba(q, k, tiling), {}),
        "BiFormer": (lambda q, k, v: P.biformer(q, k, tiling, topk=max(4, len(tiling.lengths) // 8)), {}),
        "MoBA, pooled": (
            lambda q, k, v: P.moba(q, k, moba_topk=max(2, blocks // 8), gate="pooled", is_causal=False),
            {},
        ),
        "MoBA, per token": (lambda q, k, v: P.moba(q, k, moba_topk=max(2, blocks // 8), is_causal=False), {}),
        "SpargeAttn": (lambda q, k, v: P.sparge(q, k), {}),
        "ProxyAttn": (lambda q, k, v: P.proxy(q, k, groups=1), {}),
        "SVG 1": (lambda q, k, v: P.svg1(q, k, v, grid), {}),
        "SVG 2": (
            lambda q, k, v: P.svg2(q, k, num_q_clusters=min(300, blocks), num_k_clusters=min(1000, 2 * blocks))[0],
            {},
        ),
        "PBS (causal)": (lambda q, k, v: P.pbs(q, k), {}),
        "Duo (causal)": (fixed(lambda: P.duo(streaming, tokens)), {}),
    }


def dropping(plan: BlockPlan) -> BlockPlan:
    """The same blocks, the rest dropped instead of approximated."""
    return BlockPlan(plan.block, plan.indices, plan.n_full, plan.n_masked, key_blocks=plan.key_blocks)


def aligned_window(grid: tuple[int, ...], device: str) -> BlockPlan:
    """A window whose stride is the tile, so that its blocks need no mask where the tile divides the grid."""
    tile = P.best_tile(grid)
    kernel = [min(n, max(t, round(n * 0.4 / t) * t)) for n, t in zip(grid, tile)]
    return P.window(grid, kernel, stride=tile, tile=tile, device=device)
