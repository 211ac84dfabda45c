"""Decoding coarse to fine: VAR's pyramid and residual codebooks against loops that spell the algorithm out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from millstream.samplers import counts as c
from millstream.samplers.heads import Categorical
from millstream.samplers.levels import Codebooks, Level, Scales, decoding_levels, level_weights
from millstream.samplers.orders import Confidence
from millstream.samplers.tokens import VALUE, Ask

SIDES, CHANNELS, V = (1, 2, 3, 5), 4, 7
TABLE = torch.randn(V, CHANNELS, generator=torch.Generator().manual_seed(0))
KERNELS = torch.randn(len(SIDES), CHANNELS, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.2
READER = torch.randn(CHANNELS, V, generator=torch.Generator().manual_seed(2))


class OneSeed:
    def __init__(self, seed: int) -> None:
        self.seed, self.asked = seed, []

    def uniform(self, step: int, kind: int, shape: tuple[int, ...]) -> Tensor:
        self.asked.append((step, kind))
        return torch.rand(1, *shape, generator=torch.Generator().manual_seed(self.seed + 10 * step + kind))

    def normal(self, step: int, kind: int, shape: tuple[int, ...]) -> Tensor:
        raise AssertionError("discrete tokens need no normal numbers")


def phi(level: int, canvas: Tensor) -> Tensor:
    return canvas + F.conv2d(canvas, KERNELS[level], padding=1)


def pyramid() -> Scales:
    return Scales(SIDES, lambda tokens: TABLE[tokens], phi, torch.zeros(()), CHANNELS)


def network(level: int, given: Tensor | None, ask: Ask) -> Tensor:
    if given is None:
        assert level == 0
        return READER.sum(0).expand(1, 1, V)
    return torch.tanh(given @ READER).gather(1, ask.targets[..., None].expand(-1, -1, V)) * 3


def test_next_scale_prediction_equals_the_published_loop() -> None:
    steps = list(decoding_levels(network, pyramid(), [Level(Categorical())] * 4, batch=1, draws=OneSeed(3)))
    canvas = torch.zeros(1, CHANNELS, 5, 5)
    for level, side in enumerate(SIDES):
        if level == 0:
            logits = READER.sum(0).expand(1, 1, V)
        else:
            shrunk = F.adaptive_avg_pool2d(canvas, side)  # what "area" means
            logits = torch.tanh(torch.einsum("bchw,cv->bhwv", shrunk, READER).reshape(1, -1, V)) * 3
        uniform = OneSeed(3).uniform(level, VALUE, (side * side,))
        tokens = Categorical().invert(logits, uniform)
        assert torch.equal(steps[level].tokens, tokens)
        image = TABLE[tokens].reshape(1, side, side, CHANNELS).permute(0, 3, 1, 2)
        canvas = canvas + phi(level, image if side == 5 else F.interpolate(image, (5, 5), mode="bicubic"))
        torch.testing.assert_close(steps[level].canvas, canvas)


def test_codebooks_take_masked_steps_at_first_and_greedy_ones_after() -> None:
    """SoundStorm's plan: several steps on the first codebook, one pass on each other."""
    tables = torch.randn(3, V, CHANNELS, generator=torch.Generator().manual_seed(4))
    levels = Codebooks(lambda level, tokens: tables[level][tokens], 3, 12, torch.zeros(()), CHANNELS)
    asked: list[tuple[int, int]] = []

    def watching(level: int, given: Tensor | None, ask: Ask) -> Tensor:
        asked.append((level, ask.targets.shape[1]))
        logits = torch.zeros(1, 12, V) if given is None else torch.tanh(given @ READER)
        return logits.gather(1, ask.targets[..., None].expand(-1, -1, V))

    greedy = Level(Categorical(temperature=0))
    plan = [Level(Categorical(), c.share_counts(12, 4), Confidence()), greedy, greedy]
    draws = OneSeed(0)
    steps = list(decoding_levels(watching, levels, plan, batch=1, draws=draws))
    assert [level for level, _ in asked] == [0, 0, 0, 0, 1, 2]
    assert asked[0] == (0, 12)
    assert len(set(draws.asked)) == len(draws.asked), "a random number was used twice"
    total = sum(tables[level][step.tokens] for level, step in enumerate(steps))
    torch.testing.assert_close(steps[-1].canvas, total)
    assert torch.equal(steps[1].tokens, torch.tanh(steps[0].canvas @ READER).argmax(-1))


def test_guidance_grows_over_the_scales() -> None:
    assert level_weights(4.0, 5) == [1, 2, 3, 4, 5]
    assert level_weights(4.0, 1) == [1]

    def doubled(level: int, given: Tensor | None, ask: Ask) -> Tensor:
        output = network(level, given, ask)
        return torch.cat([output, torch.zeros_like(output)])

    def guided(level: int, given: Tensor | None, ask: Ask) -> Tensor:
        return network(level, given, ask) * level_weights(4.0, 4)[level]

    plan, weights = [Level(Categorical())] * 4, level_weights(4.0, 4)
    one = list(decoding_levels(doubled, pyramid(), plan, batch=1, draws=OneSeed(1), guidance=weights))
    other = list(decoding_levels(guided, pyramid(), plan, batch=1, draws=OneSeed(1)))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, other))


def test_a_plan_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="there are 4 levels, so the plan and the guidance need as many; got 2"):
        next(decoding_levels(network, pyramid(), [Level(Categorical())] * 2, batch=1, draws=OneSeed(0)))
