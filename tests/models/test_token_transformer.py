"""One transformer, four ways of decoding: step by step with a cache gives what training computed at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from millstream.models.token_config import Kind
from millstream.models.token_layers import axial_angles, grid_places
from millstream.models.token_linear import GatedLinear
from millstream.models.token_transformer import TokenTransformer

V, SIDE, S, B = 13, 4, 3, 2
N = SIDE * SIDE
SIZES = {
    "dim": 32,
    "num_heads": 2,
    "ffn_dim": 48,
    "num_layers": 2,
    "text_dim": 8,
    "vocab_size": V,
    "grid": (SIDE, SIDE),
}


def model(kind: Kind, **changes: object) -> TokenTransformer:
    torch.manual_seed(0)
    cross = 2 if kind == "two_pass" else 0
    sizes = {**SIZES, "learned_positions": True, **changes}
    made = TokenTransformer(kind=kind, num_cross_layers=cross, **sizes)  # type: ignore[arg-type]
    for parameter in made.parameters():  # far from the quiet start, where a wrong mask would not be seen
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


@pytest.fixture
def text() -> Tensor:
    return torch.randn(B, S, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(V, (B, N), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def order() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(N, generator=generator) for _ in range(B)])


@torch.no_grad()
def test_two_pass_decoding_equals_training(text: Tensor, tokens: Tensor, order: Tensor) -> None:
    net = model("two_pass")
    at_once = net(tokens, text, order=order)
    cache = net.begin(text)
    for i in range(N):
        place = order[:, i : i + 1]
        torch.testing.assert_close(net.predict(place, cache)[:, 0], at_once[:, i], atol=1e-4, rtol=1e-4)
        net.feed(tokens.gather(1, place), place, cache)


@torch.no_grad()
def test_targets_do_not_see_each_other(text: Tensor, tokens: Tensor, order: Tensor) -> None:
    """So any set of them can be predicted in one pass, and a confidence order may look at all."""
    net = model("two_pass")
    cache = net.begin(text)
    net.feed(tokens.gather(1, order[:, :5]), order[:, :5], cache)
    together = net.predict(order[:, 5:], cache)
    alone = torch.cat([net.predict(order[:, i : i + 1], cache) for i in range(5, N)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_group_sees_itself_when_fed_and_feeding_nothing_is_nothing(text: Tensor, tokens: Tensor) -> None:
    net = model("two_pass")
    places = torch.arange(N).expand(B, -1)
    one, other = net.begin(text), net.begin(text)
    net.feed(tokens, places, one)
    net.feed(tokens.flip(1), places.flip(1), other)
    net.feed(tokens[:, :0], places[:, :0], other)
    # Fed as one group the order within it does not matter.
    torch.testing.assert_close(net.predict(places, one), net.predict(places, other), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_causal_decoding_equals_training(text: Tensor, tokens: Tensor) -> None:
    net = model("causal")
    at_once = net(tokens, text)
    cache = net.begin(text)
    for i in range(N):
        place = torch.full((B, 1), i)
        torch.testing.assert_close(net.predict(place, cache)[:, 0], at_once[:, i], atol=1e-4, rtol=1e-4)
        net.feed(tokens[:, i : i + 1], place, cache)


@torch.no_grad()
def test_masked_prediction_over_all_places_is_training(text: Tensor, tokens: Tensor) -> None:
    net, known = model("masked"), torch.arange(N).expand(B, -1) % 3 == 0
    cache = net.begin(text)
    everything = torch.arange(N).expand(B, -1)
    torch.testing.assert_close(
        net.predict_masked(tokens, known, cache, everything), net(tokens, text, known=known), atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_masked_sees_known_tokens_and_no_open_ones(text: Tensor, tokens: Tensor) -> None:
    net, known = model("masked"), torch.arange(N).expand(B, -1) % 3 == 0
    before = net(tokens, text, known=known)
    hidden = torch.where(known, tokens, (tokens + 1) % V)
    assert torch.equal(net(hidden, text, known=known), before)
    shown = torch.where(known, (tokens + 1) % V, tokens)
    assert not torch.allclose(net(shown, text, known=known), before)


@torch.no_grad()
@pytest.mark.parametrize("mixing", ["attention", "linear"])
def test_scales_decoding_equals_training(text: Tensor, mixing: str) -> None:
    sides = (1, 2, 4)
    net = model("scales", scale_sides=sides, token_channels=5, scale_mixing=mixing)
    inputs = torch.randn(B, 4 + 16, 5, generator=torch.Generator().manual_seed(4))
    at_once = net(inputs, text)
    assert at_once.shape == (B, 1 + 4 + 16, V)
    cache = net.begin(text)
    parts = [net.predict_scale(0, None, cache)]
    parts += [net.predict_scale(1, inputs[:, :4], cache), net.predict_scale(2, inputs[:, 4:], cache)]
    torch.testing.assert_close(torch.cat(parts, dim=1), at_once, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mixing", ["attention", "linear"])
def test_a_scale_sees_coarser_ones_and_itself_alone(text: Tensor, mixing: str) -> None:
    net = model("scales", scale_sides=(1, 2, 4), token_channels=5, scale_mixing=mixing)
    inputs = torch.randn(B, 20, 5, generator=torch.Generator().manual_seed(4))
    before = net(inputs, text)
    finer, coarser = inputs.clone(), inputs.clone()
    finer[:, 4:] += 1
    coarser[:, 0] += 1
    torch.testing.assert_close(net(finer, text)[:, :5], before[:, :5])
    changed = (net(coarser, text) - before).abs().amax(dim=-1)
    assert (changed[:, 0] < 1e-5).all(), "the first scale comes before"
    assert (changed[:, 1:] > 1e-4).all(), "every token of its own scale and of the finer one notices"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["two_pass", "masked", "causal"])
def test_the_prompt_matters_and_rows_do_not_mix(kind: Kind, text: Tensor, tokens: Tensor, order: Tensor) -> None:
    net = model(kind)
    extra = {"two_pass": {"order": order}, "masked": {"known": order < 4}, "causal": {}}[kind]
    both = net(tokens, text, **extra)
    changed = net(tokens, torch.cat([text[:1], -text[1:]]), **extra)
    assert torch.equal(both[0], changed[0])
    assert not torch.allclose(both[1], changed[1], atol=1e-2)


def test_continuous_tokens_give_conditions(text: Tensor, order: Tensor) -> None:
    net = model("two_pass", token_channels=5)
    assert net(torch.randn(B, N, 5), text, order=order).shape == (B, N, 32)


def test_grid_of_frames() -> None:
    places = grid_places((2, 3, 4))
    assert places.shape == (24, 3)
    assert places[13].tolist() == [1, 0, 1]
    net = model("two_pass", grid=(2, 3, 4), dim=24)
    assert net.tokens == 24


def test_angles_depend_on_the_distance_along_each_axis() -> None:
    cos, sin = axial_angles(torch.tensor([[3.0, 5.0]]), 8)
    rates = torch.tensor([1.0, 10000.0**-0.5], dtype=torch.float64)
    expected = torch.cat([3 * rates, 5 * rates])[None].float()
    torch.testing.assert_close(cos, expected.cos())
    torch.testing.assert_close(sin, expected.sin())
    with pytest.raises(ValueError, match="multiple of 4 to turn along 2 axes, got 6"):
        axial_angles(torch.zeros(1, 2), 6)


def test_every_parameter_learns(text: Tensor, tokens: Tensor, order: Tensor) -> None:
    net = model("two_pass").train()
    net(tokens, text, order=order).square().sum().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []


def test_saved_and_packed_models_load(tmp_path: Path, text: Tensor, tokens: Tensor, order: Tensor) -> None:
    net = model("two_pass", dim=64, ffn_dim=128)
    net.save_pretrained(tmp_path / "whole")
    net.save_packed(tmp_path / "packed")
    with torch.no_grad():
        wanted = net(tokens, text, order=order)
        whole = TokenTransformer.from_pretrained(tmp_path / "whole")
        assert torch.equal(whole(tokens, text, order=order), wanted)
        packed = TokenTransformer.from_pretrained(tmp_path / "packed")
        difference = packed(tokens, text, order=order) - wanted
    assert 0 < float(difference.std() / wanted.std()) < 0.1


def test_contradictions_are_refused(text: Tensor, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="kind must be one of two_pass, masked, causal, scales, got 'spiral'"):
        model("spiral")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='is for kind "two_pass"'):
        TokenTransformer(kind="causal", **SIZES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="\"linear\" for kind \"scales\", got 'linear' for 'causal'"):
        model("causal", scale_mixing="linear")
    with pytest.raises(ValueError, match="give token_channels, the length of its codes"):
        model("scales", scale_sides=(1, 4))
    with pytest.raises(ValueError, match=r"grid must be the last scale, \(5, 5\), got \(4, 4\)"):
        model("scales", scale_sides=(1, 5), token_channels=5)
    with pytest.raises(ValueError, match='kind "two_pass" takes order='):
        model("two_pass")(tokens, text)


@torch.no_grad()
def test_linear_attention_decodes_as_it_trains(text: Tensor, tokens: Tensor) -> None:
    net = model("masked", attention="lina")
    known = torch.rand(B, N, generator=torch.Generator().manual_seed(4)) < 0.5
    at_once = net(tokens, text, known=known)
    every = torch.arange(N).expand(B, -1)
    step = net.predict_masked(tokens, known, net.begin(text), every)
    torch.testing.assert_close(step, at_once, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="all 16 places are computed at every step and not 5; take refresh=1"):
        net.predict_masked(tokens, known, net.begin(text), every[:, :5])
    moved = tokens.clone()
    shown = int(known[0].nonzero()[0])
    moved[0, shown] = (moved[0, shown] + 1) % V
    changed = (net(moved, text, known=known) - at_once).abs().amax(dim=-1)
    assert (changed[0] > 1e-5).all(), "every place sees every known token"
    assert not changed[1].any()


@torch.no_grad()
def test_gated_linear_is_its_formula() -> None:
    """o = q sum(k g v h) / (q sum(k g)), and on the grid a convolution of v."""
    torch.manual_seed(0)
    mixer = GatedLinear(8, (2, 3))
    for parameter in mixer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    q, k, v = torch.randn(3, 1, 2 + 6, 2, 4).unbind()
    q[..., 0] = q[..., 0].abs()  # a query without any feature would be divided by next to nothing
    key_gate, value_gate = (torch.cat([torch.ones(2), gate]) for gate in (mixer.key_gate, mixer.value_gate))
    found = mixer(q, k, v)
    picture = torch.nn.functional.conv2d(
        v[:, 2:].reshape(1, 2, 3, 8).permute(0, 3, 1, 2), mixer.convolution.weight, mixer.convolution.bias, 1, 2, 1, 8
    )
    for head in range(2):
        features, keys = q[0, :, head].relu() + 1e-6, (k[0, :, head].relu() + 1e-6) * key_gate[:, None]
        share = features @ keys.T
        wanted = share @ (v[0, :, head] * value_gate[:, None]) / share.sum(dim=1, keepdim=True)
        wanted[2:] += picture[0, 4 * head : 4 * head + 4].flatten(1).T
        torch.testing.assert_close(found[0, :, head], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("causal", {}), ("masked", {"learned_positions": False}), ("masked", {"grid": (2, 2, 2)})],
)
def test_linear_attention_where_it_cannot_be_is_refused(kind: Kind, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match='attention "lina" is for kind "masked" on a grid of rows and columns'):
        model(kind, attention="lina", **changes)
