"""Linear layers in 8 bits: what they multiply with, and that a model keeps them through moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from millstream.models.quantized import DTYPES, QuantizedLinear, quantize_linears, side_by_side
from millstream.streaming.kv_cache import EightBits, KVCache, Window


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(48, 32)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.012), ("fp8", 0.05)])
def test_a_quantized_layer_gives_about_what_the_layer_gave(linear, kind, error):
    x = torch.randn(5, 7, 48)
    small, whole = QuantizedLinear(linear, DTYPES[kind])(x), linear(x)
    assert small.shape == whole.shape
    assert 1e-4 < (small - whole).norm() / whole.norm() < error


def test_casting_a_model_changes_the_bias_and_nothing_else(linear):
    layer = QuantizedLinear(linear, torch.float8_e4m3fn)
    values, scale = (part.clone() for part in layer.quantized[:2])
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert layer.quantized.values.dtype == torch.float8_e4m3fn
    assert torch.equal(layer.quantized.values.float(), values.float())
    assert torch.equal(layer.quantized.scale, scale)


def test_layers_side_by_side_share_one_piece_and_give_what_they_gave(linear):
    layers = [QuantizedLinear(nn.Linear(48, 32), torch.int8) for _ in range(3)]
    x = torch.randn(4, 48)
    before = [layer(x) for layer in layers]
    weight, bias = side_by_side(layers)
    assert weight.values.shape == (96, 48)
    assert bias.shape == (96,)
    assert all(torch.equal(layer(x), old) for layer, old in zip(layers, before))
    assert layers[1].weight.data_ptr() == weight.values.data_ptr() + 32 * 48


def test_only_plain_layers_that_are_wanted_are_replaced():
    model = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(32, 32), nn.GELU()), "b": nn.Linear(32, 32), "c": nn.Linear(32, 4)}
    )
    assert quantize_linears(model, torch.int8, lambda name: name != "b") == 1
    assert isinstance(model["a"][0], QuantizedLinear)
    assert type(model["b"]) is type(model["c"]) is nn.Linear


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.01), ("fp8", 0.04)])
@pytest.mark.parametrize("position", ["absolute", "sink"])
def test_keys_in_8_bits_are_attended_as_about_what_they_were(kind, error, position):
    torch.manual_seed(0)
    shape = {"layers": 1, "rows": 2, "heads": 2, "head_dim": 16, "tokens_per_frame": 3, "position": position}
    window = Window(4, sinks=1)
    caches = [KVCache(**shape, window=window, storage=store) for store in (None, EightBits(DTYPES[kind]))]
    for _ in range(7):
        q, k, v = torch.randn(3, 1, 3, 2, 16).unbind()
        outs = []
        for cache in caches:
            chunk = cache.open([1])
            outs.append(chunk.attend(0, q, k, v))
            chunk.commit()
        assert 0 < (outs[0] - outs[1]).norm() / outs[0].norm() < error
    saved = caches[1].snapshot(1)
    caches[1].restore(0, saved)
    assert torch.equal(caches[1].k[:, 0], caches[1].k[:, 1])
    assert caches[1].bytes < 0.5 * caches[0].bytes


def test_heads_that_8_bits_cannot_be_laid_out_for_are_refused():
    with pytest.raises(ValueError, match="multiple of 4 channels, got 6"):
        KVCache(
            layers=1, rows=1, heads=1, head_dim=6, tokens_per_frame=1, window=Window(2), storage=EightBits(torch.int8)
        )
