"""Token decoding against a slow reference that is written place by place, and what a user relies on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from millstream.samplers import counts as c
from millstream.samplers.heads import Categorical, FlowTokens
from millstream.samplers.orders import BlockOrder, Confidence, ContrastiveOrder, RandomOrder, RasterOrder
from millstream.samplers.tokens import (
    CONFIDENCE,
    ORDER,
    VALUE,
    Ask,
    Order,
    Revealed,
    decode,
    decoding,
    revealed_weights,
)

N, V = 24, 11


class SeededDraws:
    """Numbers by (seed, step, kind), made anew for each question; what kernels.noise does, with torch's generator."""

    def __init__(self, *seeds: int) -> None:
        self.seeds = seeds

    def _draw(self, step: int, kind: int, shape: tuple[int, ...], make: Callable[..., Tensor]) -> Tensor:
        seeds = (1000 * seed + 10 * step + kind for seed in self.seeds)
        return torch.stack([make(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def uniform(self, step: int, kind: int, shape: tuple[int, ...]) -> Tensor:
        return self._draw(step, kind, shape, torch.rand)

    def normal(self, step: int, kind: int, shape: tuple[int, ...]) -> Tensor:
        return self._draw(step, kind, shape, torch.randn)


def logits_of(tokens: Tensor, known: Tensor) -> Tensor:
    """A stand-in for a network: logits [B, N, V] that depend on every known token and its place."""
    place = torch.arange(tokens.shape[1])
    seen = torch.where(known, torch.sin(1.0 + tokens * 1.3 + place * 0.7), 0.0).sum(dim=1, keepdim=True)
    return 3 * torch.sin(seen[..., None] + place[:, None] * 0.9 + torch.arange(V) * 1.7)


def network(ask: Ask) -> Tensor:
    logits = logits_of(ask.tokens, ask.known)
    return logits.gather(1, ask.targets[..., None].expand(-1, -1, V))


def doubled(ask: Ask) -> Tensor:
    return torch.cat([network(ask), network(ask).flip(-1)])


def blank(batch: int = 1) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, N, dtype=torch.int64), torch.zeros(batch, N, dtype=torch.bool)


def invert(probs: list[float], uniform: float) -> int:
    reached = 0.0
    for token, p in enumerate(probs):
        reached += p
        if reached > uniform * sum(probs):
            return token
    raise AssertionError


def reference(order: str, counts: list[int], seed: int, weights: list[float] | None = None) -> list[int]:
    """Place by place, one picture, in Python's own numbers."""
    draws, tokens, known = SeededDraws(seed), [0] * N, [False] * N
    first = draws.uniform(0, ORDER, (N,))[0].tolist()
    for step, count in enumerate(counts):
        logits = logits_of(torch.tensor([tokens]), torch.tensor([known]))[0].double()
        if weights is not None:
            logits = logits.flip(-1) + weights[step] * (logits - logits.flip(-1))
        values = draws.uniform(step, VALUE, (N,))[0].tolist()
        noise = draws.uniform(step, CONFIDENCE, (N,))[0].tolist()
        scores = []
        for place in range(N):
            if known[place]:
                continue
            probs = [math.exp(x) for x in logits[place].tolist()]
            token = invert(probs, values[place])
            if order == "random":
                score = first[place]
            elif order == "raster":
                score = -place
            else:
                share = 1 - step / (len(counts) - 1)
                score = math.log(probs[token] / sum(probs)) - 4.5 * share * math.log(-math.log(noise[place]))
            scores.append((score, place, token))
        for _, place, token in sorted(scores, reverse=True)[:count]:
            tokens[place], known[place] = token, True
    return tokens


CASES = {
    "confidence": (Confidence(), c.share_counts(N, 6)),
    "random": (RandomOrder(), c.curve_counts(N, 7)),
    "raster": (RasterOrder(), c.even_counts(N, N)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("guided", [False, True])
def test_decoding_equals_the_reference(name: str, seed: int, guided: bool) -> None:
    order, counts = CASES[name]
    weights = revealed_weights(counts, 3.0) if guided else None
    decoded = decode(
        doubled if guided else network,
        *blank(),
        counts=counts,
        order=order,
        head=Categorical(),
        draws=SeededDraws(seed),
        guidance=weights,
    )
    assert decoded[0].tolist() == reference(name, counts, seed, weights)


@pytest.mark.parametrize("name", CASES)
def test_a_picture_does_not_depend_on_its_batch(name: str) -> None:
    order, counts = CASES[name]

    def drawn(*seeds: int) -> Tensor:
        draws = SeededDraws(*seeds)
        return decode(network, *blank(len(seeds)), counts=counts, order=order, head=Categorical(), draws=draws)

    together = drawn(5, 6, 7)
    for row, seed in zip(together, (5, 6, 7)):
        assert torch.equal(row, drawn(seed)[0])


@pytest.mark.parametrize("order", [Confidence(), RandomOrder(), RasterOrder(), BlockOrder(6, Confidence())])
def test_every_open_place_is_decided_once_and_given_tokens_stay(order: Order) -> None:
    tokens, known = blank(2)
    tokens[:, 3:9], known[:, 3:9] = torch.arange(6), True
    seen = known.clone()
    counts = c.curve_counts(N - 6, 5)
    steps = list(
        decoding(network, tokens, known, counts=counts, order=order, head=Categorical(), draws=SeededDraws(0, 1))
    )
    for step, count in zip(steps, counts):
        assert step.targets.shape == (2, count)
        assert not seen.gather(1, step.targets).any()
        seen = seen.scatter(1, step.targets, True)
        assert torch.equal(step.known, seen)
    assert seen.all()
    assert torch.equal(steps[-1].tokens[:, 3:9], tokens[:, 3:9])
    assert not known[:, 9:].any(), "the caller's tensor was written to"


def test_a_network_with_a_cache_is_fed_every_token_once() -> None:
    fed: list[Tensor] = []

    def watching(ask: Ask) -> Tensor:
        assert ask.known.gather(1, ask.new).all()
        assert not ask.known.gather(1, ask.targets).any()
        fed.append(ask.new)
        return network(ask)

    tokens, known = blank()
    known[:, :4] = True
    counts = c.curve_counts(N - 4, 5)
    last: list[Revealed] = list(
        decoding(watching, tokens, known, counts=counts, order=RandomOrder(), head=Categorical(), draws=SeededDraws(0))
    )
    assert fed[0].tolist() == [[0, 1, 2, 3]]
    everything = torch.cat([*fed, last[-1].targets], dim=1)
    assert everything.sort().values.tolist() == [list(range(N))]


def test_blocks_come_one_after_the_other() -> None:
    counts = c.block_counts([8, 8, 8], 2)
    order = BlockOrder(8, RandomOrder())
    steps = decoding(network, *blank(), counts=counts, order=order, head=Categorical(), draws=SeededDraws(3))
    assert [set((step.targets // 8).flatten().tolist()) for step in steps] == [{0}, {0}, {1}, {1}, {2}, {2}]


def test_uncage_starts_where_one_object_is_clearly_meant() -> None:
    attention = torch.zeros(1, N, 6)
    attention[0, :, 1] = attention[0, :, 4] = 0.5  # contested everywhere
    attention[0, 7, 1], attention[0, 19, 4] = 0.9, 0.8  # but for two places

    def at_targets(ask: Ask) -> Tensor:
        return attention.gather(1, ask.targets[..., None].expand(-1, -1, 6))

    order = ContrastiveOrder(at_targets, [(1, 2), (4, 5)], weight=1e3, inner=Confidence(0.0))
    steps = decoding(network, *blank(), counts=[1, 1, 22], order=order, head=Categorical(), draws=SeededDraws(0))
    assert [step.targets.flatten().tolist() for step in steps][:2] == [[7], [19]]
    with pytest.raises(ValueError, match="two or more groups"):
        ContrastiveOrder(at_targets, [(1, 2)])


def test_categorical_draws_by_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.0, 0.3, 0.2]).log()
    uniform = (torch.arange(1000) + 0.5) / 1000

    def shares(head: Categorical) -> list[float]:
        drawn = head.invert(logits.expand(1000, 4), uniform)
        return [round(x, 3) for x in (torch.bincount(drawn, minlength=4) / 1000).tolist()]

    assert shares(Categorical()) == pytest.approx([0.5, 0, 0.3, 0.2], abs=2e-3)
    assert shares(Categorical(top_k=2)) == pytest.approx([0.625, 0, 0.375, 0], abs=2e-3)
    assert shares(Categorical(top_p=0.6)) == pytest.approx([0.625, 0, 0.375, 0], abs=2e-3)
    assert shares(Categorical(temperature=1e-3)) == [1, 0, 0, 0]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-24, 1.0])  # 1 is what the numbers below it round to
def test_impossible_tokens_are_never_drawn(uniform: float) -> None:
    logits = torch.full((5000,), -torch.inf)
    logits[[17, 3211]] = torch.tensor([0.3, 0.0])
    assert int(Categorical().invert(logits, torch.tensor(uniform))) == (17 if uniform == 0 else 3211)


def test_a_broken_network_gives_tokens_that_exist() -> None:
    logits = torch.tensor([[torch.nan] * 5, [torch.inf] * 5, [-torch.inf] * 5])
    tokens = Categorical().invert(logits, torch.full((3,), 0.5))
    assert ((tokens >= 0) & (tokens < 5)).all()


def test_temperature_zero_is_greedy_and_needs_no_draw() -> None:
    tokens, known = blank()
    ask = Ask(tokens, known, torch.arange(N)[None], known.nonzero()[None, :, 0], 0, 1)
    values, _ = Categorical(temperature=0).draw(network(ask), ask, None, None)  # type: ignore[arg-type]
    assert torch.equal(values, network(ask).argmax(-1))


def test_flow_head_reaches_the_tokens_of_a_known_flow() -> None:
    """For tokens N(z, 0.1^2) the flow is known, and Euler's rule must end in that distribution."""

    def velocity(x: Tensor, sigma: float, z: Tensor) -> Tensor:
        spread = 0.1
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        clean = z + (1 - sigma) * spread**2 / variance * (x - (1 - sigma) * z)
        return (x - clean) / max(sigma, 1e-6)

    def conditions(ask: Ask) -> Tensor:
        return (ask.targets[..., None] * 0.5).float().expand(-1, -1, 3)

    head = FlowTokens(velocity, channels=3, steps=100)
    tokens = torch.zeros(64, N, 3)
    drawn = decode(
        conditions,
        tokens,
        torch.zeros(64, N, dtype=torch.bool),
        counts=c.cosine_counts(N, 4),
        order=RandomOrder(),
        head=head,
        draws=SeededDraws(*range(64)),
    )
    wanted = torch.arange(N)[None, :, None] * 0.5
    assert (drawn - wanted).mean().abs() < 0.01
    assert 0.08 < float((drawn - wanted).std()) < 0.12


def test_flow_head_guides_its_velocity() -> None:
    """With v = x - z the guided flow is that of negative + w (positive - negative)."""
    head = FlowTokens(lambda x, sigma, z: x - z, channels=2, steps=3)
    ask = Ask(torch.zeros(1, 4, 2), torch.zeros(1, 4, dtype=torch.bool), torch.arange(4)[None], torch.zeros(1, 0), 0, 1)  # type: ignore[arg-type]
    positive, negative = torch.rand(1, 4, 2), torch.rand(1, 4, 2)
    guided, _ = head.draw(torch.cat([positive, negative]), ask, SeededDraws(0), 2.5)
    plain, _ = head.draw(negative + 2.5 * (positive - negative), ask, SeededDraws(0), None)
    torch.testing.assert_close(guided, plain)


def test_what_does_not_fit_is_refused() -> None:
    def attempt(**changes: object) -> Tensor:
        given = {"counts": [N], "order": RandomOrder(), "head": Categorical(), "draws": SeededDraws(0), **changes}
        return decode(network, *blank(), **given)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="counts decide 20 tokens of 24, so 4 must be known in every row"):
        attempt(counts=[20])
    with pytest.raises(ValueError, match="at least 1 each and at most 24 together"):
        attempt(counts=[0, 24])
    with pytest.raises(ValueError, match=r"one weight per step \(1\), got 2"):
        attempt(guidance=[1.0, 1.0])
    with pytest.raises(ValueError, match="needs a head that knows probabilities"):
        attempt(order=Confidence(), head=FlowTokens(lambda x, s, z: x, 3))
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        Categorical(temperature=-1)


def test_nothing_open_is_nothing_to_do() -> None:
    tokens, known = blank()
    same = decode(network, tokens, ~known, counts=[], order=RandomOrder(), head=Categorical(), draws=SeededDraws(0))
    assert torch.equal(same, tokens)
