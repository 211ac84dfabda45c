"""Our ways of decoding a picture's tokens, each with a model of random weights; `image.py` tells what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from millstream.models.flow_head import FlowHead
from millstream.models.token_config import Kind
from millstream.models.token_transformer import TokenTransformer
from millstream.pipelines.token_networks import CachedNetwork, MaskedNetwork, PhiloxDraws
from millstream.samplers import (
    Ask,
    BlockOrder,
    Categorical,
    Confidence,
    ContrastiveOrder,
    FlowTokens,
    Head,
    Level,
    Order,
    RandomOrder,
    RasterOrder,
    Scales,
    block_counts,
    cosine_counts,
    curve_counts,
    decode,
    decoding_levels,
    even_counts,
    level_weights,
    revealed_weights,
    share_counts,
)
from millstream.samplers.levels import VAR_SIZES

SIDE = 16
COUNT = SIDE * SIDE
GUIDANCE = 4.0
CODE_CHANNELS = 32  # of VAR's codes
LATENT_CHANNELS = 16  # of MAR's continuous tokens
CLASSES = 1000
FLOW_STEPS = 25
OBJECTS = ((1, 2), (5, 6))  # which prompt tokens name what, for UNCAGE


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


@dataclass(frozen=True)
class Method:
    """A way of decoding.

    `layers`: times the size's own, as its paper has more or fewer at that width. `changes`: to the model's config.
    """

    kind: Kind
    steps: int
    order: Literal["random", "surest", "raster", "rows", "contrastive", "scales", "flow"]
    layers: float = 1
    changes: Mapping[str, Any] = field(default_factory=dict)


LEARNT = {"learned_positions": True}
SCALES = {"scale_sides": VAR_SIZES, "token_channels": CODE_CHANNELS}
VAR = {**SCALES, **LEARNT, "adaptive": True, "num_classes": CLASSES}
MAR = {**LEARNT, "token_channels": LATENT_CHANNELS}
METHODS = {
    "random order, 64 steps": Method("two_pass", 64, "random"),
    "raster": Method("causal", COUNT, "raster"),
    "random order, 32 steps": Method("two_pass", 32, "random"),
    "random order, 16 steps": Method("two_pass", 16, "random"),
    "masked, 12 steps": Method("masked", 12, "surest"),
    "next scale, 10 steps": Method("scales", len(VAR_SIZES), "scales", changes=SCALES),
    "VAR's adaptive layers, 10 steps": Method("scales", len(VAR_SIZES), "scales", layers=2 / 3, changes=VAR),
    "M-VAR, 10 steps": Method("scales", len(VAR_SIZES), "scales", changes={**SCALES, "scale_mixing": "linear"}),
    "block order, 16 steps": Method("two_pass", SIDE, "rows"),
    "UNCAGE, 12 steps": Method("masked", 12, "contrastive"),
    "LINA, 64 steps": Method("masked", 64, "flow", layers=4 / 3, changes={**MAR, "attention": "lina"}),
    "MAR, 64 steps": Method("masked", 64, "flow", layers=4 / 3, changes=MAR),
}


class Parts(NamedTuple):
    """What a decoding runs: `head` for continuous tokens."""

    model: TokenTransformer
    head: FlowHead | None
    text: Tensor

    @property
    def parameters(self) -> int:
        """How many both networks have."""
        nets = [net for net in (self.model, self.head) if net is not None]
        return sum(parameter.numel() for net in nets for parameter in net.parameters())


def make_parts(size: Size, method: Method, device: torch.device, batch: int) -> Parts:
    """Random weights; in bfloat16 at a published size on CUDA. All kinds have the same number of layers, which the two
    passes of a two_pass model share out evenly."""
    torch.manual_seed(0)
    layers = round(size.layers * method.layers)
    cross = layers // 2 if method.kind == "two_pass" else 0
    adaptive = "adaptive" in method.changes
    model: Any = TokenTransformer(
        kind=method.kind,
        vocab_size=min(size.vocab, 4096) if adaptive else size.vocab,
        grid=(SIDE, SIDE),
        dim=size.dim,
        num_heads=size.heads,
        ffn_dim=4 * size.dim if adaptive else -(-size.dim * 8 // 3 // 64) * 64,
        num_layers=layers - cross,
        num_cross_layers=cross,
        text_dim=size.text_dim,
        **method.changes,
    ).eval()
    head: Any = FlowHead(LATENT_CHANNELS, size.dim, size.dim * 5 // 4, 8).eval() if method.order == "flow" else None
    dtype = torch.bfloat16 if device.type == "cuda" and size.dim >= 1024 else torch.float32
    model = model.to(device).to(dtype)  # diffusers' `to` hides its signature from type checkers
    head = None if head is None else head.to(device).to(dtype)
    prompt = max(size.prompt, 8) if method.order == "contrastive" else size.prompt
    if adaptive:
        text = torch.arange(2 * batch, device=device) % CLASSES
        text[batch:] = CLASSES
    else:
        text = torch.randn(2 * batch, prompt, size.text_dim, device=device, dtype=dtype)
    return Parts(model, head, text)


def make_draw(parts: Parts, method: Method, seeds: Tensor, refresh: int) -> Callable[[], Tensor]:
    """A whole decoding, from the prompt to the tokens."""
    model, text, batch, draws = parts.model, parts.text, len(seeds), PhiloxDraws(seeds)
    if method.order == "scales":
        return partial(draw_scales, model, text, draws, batch)
    watch = Watch(model) if method.order == "contrastive" else None
    counts, order, head = plan_of(method, parts, watch)
    shape = (batch, COUNT) if parts.head is None else (batch, COUNT, LATENT_CHANNELS)
    blank = torch.zeros(shape, dtype=torch.int64 if parts.head is None else model.dtype, device=text.device)
    known = torch.zeros(batch, COUNT, dtype=torch.bool, device=text.device)
    weights = revealed_weights(counts, GUIDANCE)

    def draw() -> Tensor:
        masked = method.kind == "masked"
        network: Any = MaskedNetwork(model, text, refresh=refresh) if masked else CachedNetwork(model, text)
        network = network if watch is None else watch.over(network)
        given = {"counts": counts, "order": order, "head": head, "draws": draws, "guidance": weights}
        return decode(network, blank, known, **given)

    return draw


def plan_of(method: Method, parts: Parts, watch: Watch | None) -> tuple[list[int], Order, Head]:
    """Counts, order and head."""
    if method.order == "flow":
        flow: Any = parts.head

        def velocity(x: Tensor, sigma: float, condition: Tensor) -> Tensor:
            return flow(x.to(condition.dtype), sigma, condition).float()

        return cosine_counts(COUNT, method.steps), RandomOrder(), FlowTokens(velocity, LATENT_CHANNELS, FLOW_STEPS)
    if method.order == "rows":
        return block_counts([SIDE] * SIDE, 1), BlockOrder(SIDE), Categorical()
    if method.order == "contrastive":
        assert watch is not None, "what guides the order looks at the model"
        return share_counts(COUNT, method.steps), ContrastiveOrder(watch.attention, OBJECTS), Categorical()
    schedules = {"random": curve_counts, "surest": share_counts, "raster": even_counts}
    orders: dict[str, Order] = {"random": RandomOrder(), "surest": Confidence(), "raster": RasterOrder()}
    return schedules[method.order](COUNT, method.steps), orders[method.order], Categorical()


class Watch:
    """How much places look at each of the prompt's tokens, over all layers and heads, for UNCAGE's order.

    A *surrogate*: shares among the prompt's tokens alone, from the queries that the network has just computed, so that
    the picture's own keys need not be looked at twice.
    """

    def __init__(self, model: TokenTransformer) -> None:
        self.queries: list[Tensor] = []
        self.network: MaskedNetwork | None = None
        blocks: Any = model.self_decoder.blocks
        for block in blocks:
            block.query.register_forward_hook(lambda module, given, queries: self.queries.append(queries))

    def over(self, network: MaskedNetwork) -> Callable[[Ask], Tensor]:
        """`network`, watched from now on."""
        self.network = network

        def watched(ask: Ask) -> Tensor:
            self.queries.clear()
            return network(ask)

        return watched

    def attention(self, ask: Ask) -> Tensor:
        """[B, n, S] at the targets."""
        assert self.network is not None, "the network is asked before its attention"
        cache, batch = self.network.cache, ask.known.shape[0]
        total = torch.zeros((), device=ask.known.device)
        for queries, layer in zip(self.queries, cache.layers, strict=True):
            keys = layer.k[:batch, : cache.prompt.shape[1]]
            scores = torch.einsum("bnhd,bshd->bhns", queries[:batch], keys) / keys.shape[-1] ** 0.5
            total = total + scores.float().softmax(dim=-1).mean(dim=1)
        return (total / len(cache.layers)).gather(1, ask.targets[..., None].expand(-1, -1, total.shape[-1]))


def draw_scales(model: TokenTransformer, text: Tensor, draws: PhiloxDraws, batch: int) -> Tensor:
    """VAR with a random codebook; the convolution phi, a thousandth of the work, is left out."""
    cache = model.begin(text)
    vocab = model.config["vocab_size"]
    table = torch.sin(torch.arange(vocab * CODE_CHANNELS, device=text.device))
    table = table.view(vocab, CODE_CHANNELS).to(model.dtype)

    def network(level: int, given: Tensor | None, ask: Ask) -> Tensor:
        return model.predict_scale(level, None if given is None else given.repeat(2, 1, 1), cache)

    levels = Scales(VAR_SIZES, lambda tokens: table[tokens], lambda level, x: x, table, CODE_CHANNELS)
    plan = [Level(Categorical())] * len(VAR_SIZES)
    weights = level_weights(GUIDANCE - 1, len(VAR_SIZES))
    done = decoding_levels(network, levels, plan, batch=batch, draws=draws, guidance=weights)
    return torch.cat([level.tokens for level in done], dim=1)
