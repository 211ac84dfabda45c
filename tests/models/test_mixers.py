"""Linear and hybrid backbones: what is streamed chunk by chunk equals the whole, for every kind of mixer."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from millstream.kernels import rotary_angles
from millstream.models.block import Context
from millstream.models.mixers import KINDS, make_cache, mixer_kinds
from millstream.models.transformer import CausalTransformer3DModel
from millstream.streaming.kv_cache import KVCache, Window
from millstream.streaming.linear_state import HybridCache

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 4,
    "cross_attention_layers": (1,),
    "position_grid": (2, 3),
}
MIXERS = [f"linear({kind})" for kind in KINDS] + ["hybrid(sana, every=2)", ("softmax", "lina", "lightnet", "gated")]
WINDOWS = [Window(4), Window(6, block=3), Window(4, sinks=1)]


def model(mixer, **extra) -> CausalTransformer3DModel:
    torch.manual_seed(0)
    made = CausalTransformer3DModel(**(CONFIG | extra), mixer=mixer).eval()
    for name, parameter in made.named_parameters():  # gates and scales begin as ones, which would hide a mistake
        if ".mixer." in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def inputs(rows=2, frames=9):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, 4, frames, 4, 6, generator=generator)
    text = torch.randn(rows, 5, 16, generator=generator)
    return latents, torch.linspace(0, 999, rows * frames).view(rows, frames), text


def stream(transformer, cache, rows, latents, timestep, text, block):
    """Chunks as a sampler draws them: two noisy passes whose results are thrown away, then the one that counts."""
    keys, outs = transformer.embed_text(text), []
    for part, level in zip(latents.split(block, dim=2), timestep.split(block, dim=1)):
        chunk = cache.open(rows, part.shape[2])
        for noise in (2.0, 1.0, 0.0):
            out = transformer(part + noise, level, text_keys=keys, cache=chunk).sample
        chunk.commit()
        outs.append(out)
    return torch.cat(outs, dim=2)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
@torch.no_grad()
def test_streamed_equals_whole(mixer, window):
    transformer, (latents, timestep, text) = model(mixer), inputs()
    cache = make_cache(transformer, rows=2, tokens_per_frame=6, window=window)
    seen = stream(transformer, cache, [0, 1], latents, timestep, text, window.block)
    expected = transformer(latents, timestep, text, window=window).sample
    torch.testing.assert_close(seen, expected, atol=2e-5, rtol=1e-4)
    whole = transformer(latents, timestep, text).sample
    assert (whole - expected).norm() / expected.norm() > 1e-3, "the past must not see the future"


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
@torch.no_grad()
def test_a_linear_layer_remembers_beyond_the_window(mixer):
    transformer, (latents, timestep, text) = model(mixer), inputs(rows=1)
    other = latents.clone()
    other[:, :, 0] += 1
    window = Window(2)
    a, b = (transformer(x, timestep, text, window=window).sample[:, :, -1] for x in (latents, other))
    plain = model("softmax", num_layers=1)
    c, d = (plain(x, timestep, text, window=window).sample[:, :, -1] for x in (latents, other))
    assert torch.equal(c, d)
    assert not torch.equal(a, b)


@pytest.mark.parametrize("mixer", ["linear(sana)", "hybrid(gated, every=2)"])
@torch.no_grad()
def test_rollback_and_fork_mid_stream(mixer):
    transformer, (latents, timestep, text) = model(mixer), inputs(rows=1, frames=8)
    cache = make_cache(transformer, rows=2, tokens_per_frame=6, window=Window(4), spare=2)
    keys = transformer.embed_text(text)

    def draw(row, frame, offset=0.0):
        chunk = cache.open([row])
        part, level = latents[:, :, frame : frame + 1] + offset, timestep[:, frame : frame + 1]
        out = transformer(part, level, text_keys=keys, cache=chunk).sample
        chunk.commit()
        return out

    for frame in range(5):
        draw(0, frame)
    cache.restore(1, cache.snapshot(0))
    for frame in (5, 6):
        draw(1, frame, offset=5.0)
    cache.rollback(1, 2)
    for frame in (5, 6, 7):
        assert torch.equal(draw(0, frame), draw(1, frame))


@torch.no_grad()
def test_a_pass_that_only_remembers_writes_the_same():
    transformer, (latents, timestep, text) = model("hybrid(sana, every=3)"), inputs(rows=1, frames=5)
    keys = transformer.embed_text(text)
    caches = [make_cache(transformer, rows=1, tokens_per_frame=6, window=Window(3)) for _ in range(2)]
    for frame in range(5):
        part, level = latents[:, :, frame : frame + 1], timestep[:, frame : frame + 1]
        chunks = [cache.open([0]) for cache in caches]
        transformer(part, level, text_keys=keys, cache=chunks[0])
        transformer.remember(part, level, text_keys=keys, cache=chunks[1])
        for chunk in chunks:
            chunk.commit()
    for name, value in caches[0].snapshot(0).items():
        torch.testing.assert_close(caches[1].snapshot(0)[name], value)


def test_every_parameter_learns():
    for mixer in MIXERS:
        transformer, (latents, timestep, text) = model(mixer).train(), inputs()
        transformer(latents, timestep, text, window=Window(4)).sample.square().mean().backward()
        silent = [name for name, value in transformer.named_parameters() if value.grad is None or not value.grad.any()]
        assert not silent, mixer


@torch.no_grad()
def test_save_and_load(tmp_path):
    for number, mixer in enumerate(MIXERS):
        transformer, given = model(mixer), inputs()
        transformer.save_pretrained(tmp_path / str(number))
        loaded = CausalTransformer3DModel.from_pretrained(tmp_path / str(number)).eval()
        assert torch.equal(loaded(*given, window=Window(4)).sample, transformer(*given, window=Window(4)).sample)


@torch.no_grad()
def test_softmax_weights_fit_a_linear_model_and_back():
    plain, linear = model("softmax"), model("linear(sana)")
    linear.load_state_dict(plain.state_dict(), strict=True)
    extra = model("linear(gated)").load_state_dict(plain.state_dict(), strict=False)
    assert not extra.unexpected_keys
    assert all(".mixer." in name for name in extra.missing_keys)


@torch.no_grad()
def test_slow_decays_survive_half_precision():
    """In bfloat16 a factor of 0.9990 would be 1; what a stream remembers must not depend on its dtype."""
    transformer = model("linear(lightning)").to(torch.bfloat16)
    mixer = transformer.blocks[3].mixer
    q = torch.ones(1, 6, 2, 12, dtype=torch.bfloat16)
    context = Context(rotary_angles(torch.arange(1), 2, 3, 12), None, None, (1, 2, 3), 6)
    decay = mixer.features(q.flatten(2), q, q, q, context)["decay"]
    torch.testing.assert_close(decay, torch.tensor([-1.0, -2.0]).exp(), atol=1e-6, rtol=0)  # 8 / 2 heads * 1 / 4


@torch.no_grad()
def test_lina_is_its_formula():
    """One frame: o = q (k^T v / N) / (q . mean k + 1e-6), plus the convolution of v."""
    transformer = model("linear(lina)")
    mixer, block = transformer.blocks[0].mixer, transformer.blocks[0]
    seen = {}
    block.mixer.register_forward_hook(lambda module, given, out: seen.update(given=given, out=out))
    latents, timestep, text = inputs(rows=1, frames=1)
    transformer(latents, timestep, text)
    _, q, k, v, _ = seen["given"]
    q, k = (q.relu() + 1e-6).double(), (k.relu() + 1e-6).double() * mixer.key_gate[:, None, None]
    gated = v.double() * mixer.value_gate[:, None, None]
    q, k, gated = (part.transpose(1, 2) for part in (q, k, gated))
    out = q @ (k.transpose(-1, -2) @ gated / 6) / ((q * k.mean(2, keepdim=True)).sum(-1, keepdim=True) + 1e-6)
    picture = v.double().reshape(1, 2, 3, 24).permute(0, 3, 1, 2)
    weight, bias = mixer.convolution.weight.double(), mixer.convolution.bias.double()
    local = F.conv2d(picture, weight, bias, padding=2, groups=24).permute(0, 2, 3, 1).reshape(1, 6, 2, 12)
    torch.testing.assert_close(seen["out"].double(), out.transpose(1, 2) + local, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixer", ["linear(sana)", "linear(lightning)", "linear(gated)"])
@torch.no_grad()
def test_only_distances_matter_where_features_are_rotated(mixer):
    """A stream that begins at frame 10,000 draws what one that begins at 0 draws."""
    transformer, (latents, timestep, text) = model(mixer), inputs(rows=1, frames=4)
    near, far = (
        transformer(latents, timestep, text, window=Window(4), positions=torch.arange(4) + start).sample
        for start in (0, 10_000)
    )
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_a_long_stream_keeps_its_size():
    transformer = model("linear(sana)")
    cache = make_cache(transformer, rows=1, tokens_per_frame=6, window=Window(2))
    latents, timestep, text = inputs(rows=1, frames=100)
    sizes = cache.bytes
    out = stream(transformer, cache, [0], latents, timestep, text, 1)
    assert out.isfinite().all()
    assert cache.bytes == sizes
    norms = out[0].square().mean(dim=(0, 2, 3)).sqrt()
    assert norms[50:].max() < 3 * norms[:50].max()


def test_names_of_mixers():
    assert mixer_kinds("softmax", 3) == ["softmax"] * 3
    assert mixer_kinds("linear", 2) == mixer_kinds("linear(sana)", 2) == ["sana", "sana"]
    assert mixer_kinds("hybrid", 5) == ["sana", "sana", "sana", "softmax", "sana"]
    assert mixer_kinds("hybrid(lightning, every=2)", 4) == ["lightning", "softmax"] * 2
    assert mixer_kinds(["softmax", "lina"], 2) == ["softmax", "lina"]
    wrong = ["mamba", "linear(mamba)", "hybrid(sana, every=1)", "hybrid(sana, every=0)", "linear(sana, every=2)", ""]
    for mixer in wrong:
        with pytest.raises(ValueError, match=r"mixer must be 'softmax', .* got "):
            mixer_kinds(mixer, 4)
    with pytest.raises(ValueError, match=r"for 3 layers, got \['softmax', 'lina'\]"):
        mixer_kinds(["softmax", "lina"], 3)
    with pytest.raises(ValueError, match=r"give position_grid=\(rows, columns\)"):
        model("linear(lina)", position_grid=None)


@torch.no_grad()
def test_what_it_cannot_do_is_refused():
    transformer, (latents, timestep, text) = model("hybrid(sana, every=2)"), inputs()
    assert type(make_cache(model("softmax"), rows=1, tokens_per_frame=6, window=Window(2))) is KVCache
    assert isinstance(make_cache(transformer, rows=1, tokens_per_frame=6, window=Window(2)), HybridCache)
    window = Window(4)
    expected = transformer(latents, timestep, text, window=window).sample
    mask = window.mask(9, 6)
    assert torch.equal(transformer(latents, timestep, text, window=window, mask=mask).sample, expected)
    with pytest.raises(ValueError, match="give the window it was made from as well"):
        transformer(latents, timestep, text, mask=mask)
    plain = KVCache(layers=4, rows=2, heads=2, head_dim=12, tokens_per_frame=6, window=window)
    with pytest.raises(ValueError, match=r"a KVCache cannot serve; use models\.mixers\.make_cache"):
        transformer(latents[:, :, :1], timestep[:, :1], text, cache=plain.open([0, 1]))
    with pytest.raises(ValueError, match="54 tokens and block=24"):
        transformer(latents, timestep, text, window=Window(4, block=4))
