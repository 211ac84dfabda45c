"""Guidance: mechanisms agree, the negative is not computed in vain, and edges are refused."""

from __future__ import annotations

import pytest
import torch

from millstream.samplers import (
    BatchedPair,
    ConstantWeight,
    Guidance,
    LinearWeight,
    Residual,
    TwoCalls,
    add_noise,
    combine,
)


class Network:
    """A row-wise stand-in for a model that counts its calls and rows."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, sigma, condition):
        self.rows.append(x.shape[0])
        return torch.tanh(x + condition) * sigma + condition


def tensors(*shape, count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(
    "sigma", [0.6, torch.tensor([[0.2], [0.9]]), torch.tensor([[0.4]])], ids=["number", "rows", "one"]
)
def test_a_batched_pair_equals_two_calls(sigma):
    x, positive, negative = tensors(2, 5)
    one, two = Network(), Network()
    batched = Guidance(ConstantWeight(3.0), BatchedPair()).predict(one, x, sigma, positive, negative)
    apart = Guidance(ConstantWeight(3.0), TwoCalls()).predict(two, x, sigma, positive, negative)
    torch.testing.assert_close(batched, apart)
    expected = Network()(x, sigma, negative) + 3 * (Network()(x, sigma, positive) - Network()(x, sigma, negative))
    torch.testing.assert_close(apart, expected)
    assert (one.rows, two.rows) == ([4], [2, 2])


@pytest.mark.parametrize("mechanism", [BatchedPair(), TwoCalls(), Residual()])
def test_mechanisms_cost_what_they_declare(mechanism):
    x, positive, negative = tensors(2, 5)
    network = Network()
    mechanism.pair(network, x, 0.5, positive, negative)
    assert network.rows == [2 * mechanism.rows] * mechanism.calls


def test_without_guidance_the_network_is_asked_once_and_no_negative_is_needed():
    x, positive, _ = tensors(2, 5)
    network = Network()
    assert torch.equal(Guidance().predict(network, x, 0.5, positive), Network()(x, 0.5, positive))
    assert network.rows == [2]


def test_the_weight_moves_with_the_step():
    assert [LinearWeight(1.0, 5.0)(step, 5) for step in range(5)] == pytest.approx([1, 2, 3, 4, 5])
    assert [LinearWeight(5.0, 1.0)(step, 2) for step in range(2)] == [5, 1]
    assert LinearWeight(2.0, 7.0)(0, 1) == 2
    x, positive, negative = tensors(2, 5)
    guidance, network = Guidance(LinearWeight(1.0, 4.0), TwoCalls()), Network()
    drawn = [guidance.predict(network, x, 0.5, positive, negative, step=step, n_steps=4) for step in range(4)]
    assert network.rows == [2] + [2, 2] * 3  # weight 1 at the first step: no negative
    first, last = Network()(x, 0.5, positive), Network()(x, 0.5, negative)
    for step, prediction in enumerate(drawn):
        torch.testing.assert_close(prediction, combine(first, last, step + 1))


def test_combine_meets_both_ends_and_keeps_the_dtype():
    positive, negative = tensors(2, 5, count=2)
    torch.testing.assert_close(combine(positive, negative, 0.0), negative)
    torch.testing.assert_close(combine(positive, negative, 1.0), positive)
    per_row = combine(positive, negative, torch.tensor([[0.0], [1.0]]))
    torch.testing.assert_close(per_row, torch.stack([negative[0], positive[1]]))
    assert combine(positive.bfloat16(), negative.bfloat16(), 2.0).dtype == torch.bfloat16


def test_the_residual_of_a_freshly_noised_input_is_its_own_velocity():
    x0, noise, condition = tensors(2, 5)
    x = add_noise(x0, noise, 0.7)
    _, virtual = Residual().pair(Network(), x, 0.7, condition, x0)
    torch.testing.assert_close(virtual, noise - x0)
    _, weaker = Residual(delta=0.5).pair(Network(), x, 0.7, condition, x0)
    torch.testing.assert_close(weaker, 0.5 * virtual)


def test_residual_guidance_in_velocity_equals_the_published_form_in_noise():
    x0, noise, condition = tensors(2, 5)
    sigma, weight = 0.7, 1.4
    x = add_noise(x0, noise, sigma) + 0.1 * condition
    guided = Guidance(ConstantWeight(weight), Residual()).predict(Network(), x, sigma, condition, x0)
    virtual = (x - (1 - sigma) * x0) / sigma
    predicted = x + (1 - sigma) * Network()(x, sigma, condition)
    torch.testing.assert_close(x + (1 - sigma) * guided, virtual + weight * (predicted - virtual))


def test_bad_input_is_refused():
    x, positive, negative = tensors(2, 5)
    guidance = Guidance(ConstantWeight(3.0))
    with pytest.raises(ValueError, match="guidance of weight 3 needs a negative condition"):
        guidance.predict(Network(), x, 0.5, positive)
    with pytest.raises(ValueError, match=r"got \[2, 5\] and \[2, 4\]: pad the shorter one, or use TwoCalls"):
        guidance.predict(Network(), x, 0.5, positive, negative[:, :4])
    with pytest.raises(ValueError, match="no direction at sigma = 0"):
        Residual().pair(Network(), x, 0.0, positive, negative)
    with pytest.raises(ValueError, match="negative must have the shape of x"):
        combine(positive, negative[:1], 2.0)
    for weight in (ConstantWeight(), LinearWeight(1.0, 2.0)):
        with pytest.raises(ValueError, match="step must be from 0 to 3, got 4"):
            weight(4, 4)
        with pytest.raises(ValueError, match="n_steps must be a whole number of at least 1"):
            weight(0, 0)
