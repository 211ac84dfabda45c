"""What is not computed twice: exact where it says so, and how far off where it approximates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from millstream.models.flow_head import FlowHead
from millstream.models.token_config import Kind
from millstream.models.token_transformer import TokenTransformer
from millstream.models.vq_codec import VQAutoencoder
from millstream.pipelines.token_networks import CachedNetwork, MaskedNetwork, PhiloxDraws
from millstream.samplers import (
    Ask,
    BlockOrder,
    Categorical,
    Confidence,
    ConstantWeight,
    FlowTokens,
    Level,
    Network,
    RandomOrder,
    RasterOrder,
    Scales,
    block_counts,
    curve_counts,
    decode,
    decoding_levels,
    even_counts,
    level_weights,
    share_counts,
)

V, SIDE, B = 24, 5, 3
N = SIDE * SIDE


def model(kind: Kind, layers: int = 3, **changes: Any) -> TokenTransformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": V, "grid": (SIDE, SIDE), "dim": 32, "num_heads": 2, "ffn_dim": 48, **changes}
    cross = 2 if kind == "two_pass" else 0
    net = TokenTransformer(kind=kind, num_layers=layers, num_cross_layers=cross, text_dim=8, **sizes)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def text(rows: int = B) -> Tensor:
    return torch.randn(rows, 4, 8, generator=torch.Generator().manual_seed(1))


DRAWS = PhiloxDraws(torch.arange(B))
BLANK = torch.zeros(B, N, dtype=torch.int64), torch.zeros(B, N, dtype=torch.bool)


class Recomputing:
    """The slow truth for kind two_pass: all known tokens, group by group, from the beginning at every question."""

    def __init__(self, net: TokenTransformer, prompt: Tensor) -> None:
        self.net, self.prompt, self.groups = net, prompt, []

    def __call__(self, ask: Ask) -> Tensor:
        self.groups.append((ask.tokens.gather(1, ask.new), ask.new))
        cache = self.net.begin(self.prompt)
        for tokens, where in self.groups:
            self.net.feed(tokens, where, cache)
        return self.net.predict(ask.targets, cache)


@torch.no_grad()
def test_the_two_pass_cache_is_exact() -> None:
    net, given = model("two_pass"), {"counts": curve_counts(N, 6), "head": Categorical(), "draws": DRAWS}
    cached = decode(CachedNetwork(net, text()), *BLANK, order=RandomOrder(), **given)  # type: ignore[arg-type]
    slow = decode(Recomputing(net, text()), *BLANK, order=RandomOrder(), **given)  # type: ignore[arg-type]
    assert torch.equal(cached, slow)


def masked(net: TokenTransformer, network: Network) -> list[Tensor]:
    """Outputs of every step of a decoding that is led by the exact network, so that steps can be compared."""
    outputs = []

    def both(ask: Ask) -> Tensor:
        outputs.append(network(ask))
        return truth(ask)

    truth = MaskedNetwork(net, text())
    counts = share_counts(N, 8)
    decode(both, *BLANK, counts=counts, order=Confidence(), head=Categorical(), draws=DRAWS)
    return outputs


@torch.no_grad()
def test_masked_decoding_without_a_cache_is_the_plain_model() -> None:
    net = model("masked")

    def plain(ask: Ask) -> Tensor:
        logits = net(ask.tokens, text(), known=ask.known)
        return logits.gather(1, ask.targets[..., None].expand(-1, -1, V))

    for mine, wanted in zip(masked(net, MaskedNetwork(net, text())), masked(net, plain)):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_delayed_caching_is_exact_in_one_layer_and_close_in_three() -> None:
    for layers, most in ((1, 1e-4), (3, 0.25)):
        net = model("masked", layers)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        exact = masked(net, MaskedNetwork(net, text()))
        delayed = masked(net, MaskedNetwork(net, text(), refresh=100))
        errors = [float((a - b).std() / a.std()) for a, b in zip(delayed, exact)]
        assert errors[0] < 1e-4, "the first question computes everything"
        assert errors[1] < 1e-4, "and at the second nothing is older than what it says"
        assert max(errors) < most
        if layers == 3:
            assert max(errors) > 1e-3, "a test that sees no error sees nothing"


@torch.no_grad()
def test_refreshing_brings_the_error_back_to_nothing() -> None:
    net = model("masked")
    exact = masked(net, MaskedNetwork(net, text()))
    refreshed = masked(net, MaskedNetwork(net, text(), refresh=3))
    for step in (0, 3, 6):
        torch.testing.assert_close(refreshed[step], exact[step], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_budget_computes_fewer_places_and_still_decides_all() -> None:
    net = model("masked")
    computed: list[int] = []
    predict = net.predict_masked

    def counting(*given: Any) -> Tensor:
        computed.append(given[3].shape[1])
        return predict(*given)

    net.predict_masked = counting  # type: ignore[method-assign]
    network = MaskedNetwork(net, text(), refresh=100, budget=6)
    counts = share_counts(N, 8)
    decode(network, *BLANK, counts=counts, order=Confidence(), head=Categorical(), draws=DRAWS)
    assert computed[0] == N
    assert all(n <= 6 + new for n, new in zip(computed[1:], counts))
    with pytest.raises(ValueError, match="refresh and budget must be at least 1, got 0 and None"):
        MaskedNetwork(net, text(), refresh=0)
    with pytest.raises(ValueError, match="linear attention keeps no keys that could be cached"):
        MaskedNetwork(model("masked", attention="lina", learned_positions=True), text(), refresh=2)


@torch.no_grad()
def test_raster_by_a_causal_model_and_guidance_in_one_batch() -> None:
    net, prompt = model("causal"), text(2 * B)
    given = {"counts": even_counts(N, N), "order": RasterOrder(), "head": Categorical(), "draws": DRAWS}
    led = decode(CachedNetwork(net, prompt), *BLANK, guidance=[2.0] * N, **given)  # type: ignore[arg-type]
    tokens = BLANK[0].clone()
    for place in range(N):
        logits = net(tokens.repeat(2, 1), prompt)[:, place]
        logits = logits[B:] + 2.0 * (logits[:B] - logits[B:])
        tokens[:, place] = Categorical().invert(logits, DRAWS.uniform(place, 1, (N,))[:, place])
    assert torch.equal(led, tokens)


@torch.no_grad()
def test_next_block_prediction_over_frames() -> None:
    """Frames of a clip one after the other, all tokens of a frame at once: one pass per frame."""
    net = model("two_pass", grid=(4, 3, 2), dim=24)
    frames = decode(
        CachedNetwork(net, text()),
        torch.zeros(B, 24, dtype=torch.int64),
        torch.zeros(B, 24, dtype=torch.bool),
        counts=block_counts([6] * 4, 1),
        order=BlockOrder(6),
        head=Categorical(),
        draws=DRAWS,
    )
    assert frames.shape == (B, 24)
    # A frame is a function of the ones before it: with the first two given, the rest comes out the same.
    known = torch.arange(24).expand(B, -1) < 12

    class LaterDraws(PhiloxDraws):
        def uniform(self, step: int, kind: int, shape: tuple[int, ...]) -> Tensor:
            return super().uniform(step + 2, kind, shape)

    class InFrames(CachedNetwork):
        """Feeds what is given frame by frame, as it was decided."""

        def __call__(self, ask: Ask) -> Tensor:
            if ask.new.shape[1] > 6:
                first = ask.new[:, :6]
                self.model.feed(ask.tokens.gather(1, first), first, self.cache)
                ask = Ask(ask.tokens, ask.known, ask.targets, ask.new[:, 6:], ask.step, ask.n_steps)
            return super().__call__(ask)

    again = decode(
        InFrames(net, text()),
        torch.where(known, frames, 0),
        known,
        counts=block_counts([6, 6], 1),
        order=BlockOrder(6),
        head=Categorical(),
        draws=LaterDraws(torch.arange(B)),
    )
    assert torch.equal(again, frames)


@torch.no_grad()
def test_next_scale_prediction_from_model_to_picture() -> None:
    """VAR whole: multi-scale codec, scale-causal transformer, levels; equal to asking training's forward at once."""
    torch.manual_seed(0)
    sides = (1, 2, 4)
    codec = VQAutoencoder(16, V, 6, (8, 16), (1, 1), (1, 1), scale_sides=sides).eval()
    net = model("scales", grid=(4, 4), scale_sides=sides, token_channels=6)
    levels = Scales(codec.sides, codec.embed, codec.mend, codec.codes, 6)
    cache = net.begin(text(2 * B))
    given: list[Tensor] = []

    def network(level: int, canvas: Tensor | None, ask: Ask) -> Tensor:
        if canvas is not None:
            given.append(canvas)
            canvas = canvas.repeat(2, 1, 1)
        return net.predict_scale(level, canvas, cache)

    plan = [Level(Categorical())] * 3
    steps = list(decoding_levels(network, levels, plan, batch=B, draws=DRAWS, guidance=level_weights(2.0, 3)))
    picture = codec.decode(torch.cat([step.tokens for step in steps], dim=1))
    assert picture.shape == (B, 3, 16, 16)
    inputs = torch.cat(given, dim=1).repeat(2, 1, 1)
    at_once = net(inputs, text(2 * B))
    first = 1 + 4
    weight = level_weights(2.0, 3)[2]
    logits = at_once[B:, first:] + weight * (at_once[:B, first:] - at_once[B:, first:])
    assert torch.equal(Categorical().invert(logits, DRAWS.uniform(2, 1, (16,))), steps[2].tokens)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("two_pass", {}), ("masked", {}), ("masked", {"attention": "lina", "learned_positions": True})],
)
@torch.no_grad()
def test_continuous_tokens_by_a_flow_head(kind: Kind, changes: dict[str, Any]) -> None:
    """MAR and LINA whole: the same loop over vectors, with the frame codec's latents in mind; guidance in the flow."""
    net = model(kind, token_channels=6, **changes)
    head = FlowHead(channels=6, condition_dim=32, dim=16, layers=1)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    weights = [ConstantWeight(2.0)(step, 4) for step in range(4)]
    tokens = decode(
        (MaskedNetwork if kind == "masked" else CachedNetwork)(net, text(2 * B)),
        torch.zeros(B, N, 6),
        BLANK[1],
        counts=curve_counts(N, 4, "cosine"),
        order=RandomOrder(),
        head=FlowTokens(head, channels=6, steps=5),
        draws=DRAWS,
        guidance=weights,
    )
    assert tokens.shape == (B, N, 6)
    assert torch.isfinite(tokens).all()
    assert tokens.std(dim=1).min() > 0.05


def test_draws_belong_to_a_picture() -> None:
    one, many = PhiloxDraws(torch.tensor([7])), PhiloxDraws(torch.tensor([3, 7]))
    assert torch.equal(one.uniform(2, 1, (N,))[0], many.uniform(2, 1, (N,))[1])
    assert torch.equal(one.normal(2, 1, (N, 3))[0], many.normal(2, 1, (N, 3))[1])
    assert not torch.equal(one.uniform(2, 1, (N,)), one.uniform(2, 2, (N,)))
    assert not torch.equal(one.uniform(2, 1, (N,)), one.uniform(3, 1, (N,)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", ["two_pass", "masked", "causal"])
@torch.no_grad()
def test_a_whole_decoding_is_one_cuda_graph(kind: Kind) -> None:
    """No value is read back, so it can be recorded; another seed in the same memory gives another picture."""
    net, prompt, seeds = model(kind).cuda(), text(2 * B).cuda(), torch.arange(B, device="cuda")
    blank = torch.zeros(B, N, dtype=torch.int64, device="cuda")
    counts = even_counts(N, N) if kind == "causal" else share_counts(N, 6)
    order = {"two_pass": RandomOrder(), "masked": Confidence(), "causal": RasterOrder()}[kind]

    def draw() -> Tensor:
        network = (MaskedNetwork if kind == "masked" else CachedNetwork)(net, prompt)
        draws, weights = PhiloxDraws(seeds), [2.0] * len(counts)
        given: dict[str, Any] = {"counts": counts, "order": order, "head": Categorical(), "draws": draws}
        return decode(network, blank, blank.bool(), guidance=weights, **given)

    wanted = draw()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = draw()
    graph.replay()
    assert torch.equal(recorded, wanted)
    seeds += 100
    graph.replay()
    assert not torch.equal(recorded, wanted)
    assert torch.equal(recorded, draw())
