"""The backbone against diffusers' `WanTransformer3DModel` on random weights, and its three kinds of attention against
one another."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from diffusers import WanTransformer3DModel

from millstream.kernels.fused import norm_modulate
from millstream.models import block, modulation
from millstream.models.quantized import quantize_linears
from millstream.models.transformer import CausalTransformer3DModel
from millstream.streaming.kv_cache import KVCache, Window

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
}
IMAGE = {"in_channels": 9, "image_dim": 10, "added_kv_proj_dim": 24}
CONFIGS = {
    "small": SMALL,
    "no cross norm": SMALL | {"cross_attn_norm": False},
    "head 128": SMALL | {"attention_head_dim": 128},
    "head 64": SMALL | {"attention_head_dim": 64, "num_attention_heads": 1},
    "patches": SMALL | {"patch_size": (2, 1, 2), "out_channels": None},
    "epsilon": SMALL | {"eps": 1e-2},
    "image": SMALL | IMAGE,
    "first and last image": SMALL | IMAGE | {"pos_embed_seq_len": 10},
}


def pair(config: dict) -> tuple[CausalTransformer3DModel, WanTransformer3DModel]:
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(**config).eval()
    for parameter in theirs.parameters():  # norms and position tables begin as ones and zeros, which would hide a swap
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = CausalTransformer3DModel(**config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def model(**extra) -> CausalTransformer3DModel:
    torch.manual_seed(0)
    return CausalTransformer3DModel(**(SMALL | extra)).eval()


def inputs(config: dict, batch: int = 2, frames: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, config["in_channels"], frames, 4, 6, generator=generator)
    # 512 prompt tokens, as diffusers' image-to-video attention takes for granted
    words = 512 if "image_dim" in config else 5
    given = {
        "hidden_states": latents,
        "encoder_hidden_states": torch.randn(batch, words, config["text_dim"], generator=generator),
    }
    if "image_dim" in config:
        given["encoder_hidden_states_image"] = torch.randn(batch, 10, config["image_dim"], generator=generator)
    if "pos_embed_seq_len" in config:  # two pictures of five tokens each, given as a batch of both
        given["encoder_hidden_states_image"] = given["encoder_hidden_states_image"].reshape(2 * batch, 5, -1)
    return given


def error(seen: torch.Tensor, expected: torch.Tensor) -> float:
    assert seen.shape == expected.shape
    return float((seen.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_diffusers(name):
    ours, theirs = pair(CONFIGS[name])
    given = inputs(CONFIGS[name])
    timestep = torch.tensor([3.0, 871.0])
    seen, expected = ours(timestep=timestep, **given), theirs(timestep=timestep, **given)
    assert error(seen.sample, expected.sample) < 1e-5
    assert torch.equal(ours(timestep=timestep, **given, return_dict=False)[0], seen.sample)


@torch.no_grad()
def test_equals_diffusers_with_a_timestep_per_frame_and_per_token():
    ours, theirs = pair(SMALL)
    given = inputs(SMALL)
    per_frame = torch.rand(2, 4, generator=torch.Generator().manual_seed(2)) * 1000
    repeated = per_frame.repeat_interleave(2 * 3, dim=1)
    expected = theirs(timestep=repeated, **given).sample
    assert error(ours(timestep=per_frame, **given).sample, expected) < 1e-5
    per_token = torch.rand(2, 24, generator=torch.Generator().manual_seed(2)) * 1000
    assert error(ours(timestep=per_token, **given).sample, theirs(timestep=per_token, **given).sample) < 1e-5
    assert error(ours(timestep=per_token, **given).sample, expected) > 1e-3


@torch.no_grad()
def test_equals_diffusers_in_bfloat16():
    ours, theirs = (side.to(torch.bfloat16) for side in pair(SMALL))
    given = {name: value.bfloat16() for name, value in inputs(SMALL).items()}
    timestep = torch.tensor([3.0, 871.0])
    seen = ours(timestep=timestep, **given).sample
    assert seen.dtype == torch.bfloat16
    assert error(seen, theirs(timestep=timestep, **given).sample) < 2e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_go_both_ways(name):
    ours, theirs = pair(CONFIGS[name])
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_takes_every_argument_of_diffusers_with_the_same_default():
    for method in ("__init__", "forward"):
        theirs = inspect.signature(getattr(WanTransformer3DModel, method)).parameters
        ours = inspect.signature(getattr(CausalTransformer3DModel, method)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        for name, parameter in theirs.items():
            if name != "encoder_hidden_states":  # ours may be given `text_keys` instead
                assert ours[name].default == parameter.default, name
        assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(ours)[len(theirs) :])


@torch.no_grad()
def test_loads_a_folder_that_diffusers_saved(tmp_path):
    ours, theirs = pair(SMALL)
    theirs.save_pretrained(tmp_path)
    loaded = CausalTransformer3DModel.from_pretrained(tmp_path).eval()
    given = inputs(SMALL)
    assert torch.equal(loaded(timestep=torch.ones(2), **given).sample, ours(timestep=torch.ones(2), **given).sample)


def cache_for(transformer: CausalTransformer3DModel, window: Window, rows: int, **options) -> KVCache:
    config = transformer.config
    return KVCache(
        layers=config.num_layers,
        rows=rows,
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        tokens_per_frame=6,
        window=window,
        **options,
    )


def draw(transformer, cache, rows, latents, timestep, **given) -> torch.Tensor:
    """A chunk as a sampler draws it: a noisy pass whose keys are thrown away, then the one that counts."""
    chunk = cache.open(rows, latents.shape[2])
    transformer(latents + 1, timestep, **given, cache=chunk)
    out = transformer(latents, timestep, **given, cache=chunk).sample
    chunk.commit()
    return out


WINDOWS = [Window(4), Window(5, sinks=2), Window(6, block=3), Window(7, sinks=1, block=3), Window(100)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@torch.no_grad()
def test_cached_equals_masked(window):
    transformer, frames = model(), 9
    given = inputs(SMALL, frames=frames)
    latents, text = given["hidden_states"], given["encoder_hidden_states"]
    timestep = torch.linspace(0, 999, 2 * frames).view(2, frames)
    expected = transformer(latents, timestep, text, window=window).sample
    cache, keys = cache_for(transformer, window, 2), transformer.embed_text(text)
    parts = [
        draw(transformer, cache, [0, 1], part, level, text_keys=keys)
        for part, level in zip(latents.split(window.block, dim=2), timestep.split(window.block, dim=1))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, atol=1e-5, rtol=1e-5)
    assert error(transformer(latents, timestep, text).sample, expected) > 1e-3


@torch.no_grad()
def test_cached_equals_masked_for_a_steered_world_with_rows_of_different_fill():
    """Actions, a prompt per frame, learned positions, cross-attention in some blocks; one row joins late."""
    transformer = model(action_dim=3, cross_attention_layers=(1,), position_grid=(2, 3))
    window, frames, late = Window(4, sinks=1), 8, 3
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, frames, 4, 6, generator=generator)
    actions = torch.randn(2, frames, 3, generator=generator)
    text = torch.randn(2, frames, 5, 16, generator=generator)
    timestep = torch.rand(2, frames, generator=generator) * 1000
    expected = transformer(latents, timestep, text, actions=actions, window=window).sample
    cache, seen = cache_for(transformer, window, 2), [[], []]
    for step in range(frames + late):
        at = {row: step - late * row for row in (0, 1) if 0 <= step - late * row < frames}

        def pick(whole, dim, at=at):
            return torch.stack([whole[row].select(dim - 1, frame) for row, frame in at.items()]).unsqueeze(dim)

        level, prompt, action = pick(timestep, 1), pick(text, 1), pick(actions, 1)
        out = draw(transformer, cache, list(at), pick(latents, 2), level, encoder_hidden_states=prompt, actions=action)
        for row, part in zip(at, out):
            seen[row].append(part)
    torch.testing.assert_close(torch.stack([torch.cat(row, dim=1) for row in seen]), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_condition_reaches_its_frame_and_none_before():
    transformer = model(action_dim=3, position_grid=(2, 3))
    given = inputs(SMALL, batch=1)
    text = given["encoder_hidden_states"][:, None].repeat(1, 4, 1, 1)
    actions, timestep = torch.zeros(1, 4, 3), torch.full((1, 4), 500.0)

    def run(**changed):
        arguments = {"timestep": timestep, "encoder_hidden_states": text, "actions": actions} | changed
        return transformer(given["hidden_states"], **arguments, window=Window(4)).sample

    before = run()
    for name, value in (("timestep", timestep), ("encoder_hidden_states", text), ("actions", actions)):
        changed = value.clone()
        changed[:, 2] += 1
        differs = (run(**{name: changed}) - before).abs().amax(dim=(0, 1, 3, 4))
        assert (differs[:2] < 1e-6).all(), name
        assert (differs[2:] > 1e-6).all(), name


@torch.no_grad()
def test_one_prompt_equals_the_same_prompt_for_every_frame():
    transformer, given = model(), inputs(SMALL)
    per_frame = given["encoder_hidden_states"][:, None].repeat(1, 4, 1, 1)
    seen = transformer(given["hidden_states"], torch.ones(2), per_frame).sample
    torch.testing.assert_close(seen, transformer(timestep=torch.ones(2), **given).sample, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_a_block_mask_equals_the_bool_mask():
    transformer, window = model(attention_head_dim=16), Window(4, sinks=1, block=2)
    given = inputs(SMALL, frames=6) | {"timestep": torch.ones(2)}
    expected = transformer(**given, window=window).sample
    torch.testing.assert_close(transformer(**given, mask=window.mask(6, 6)).sample, expected)
    mask = window.block_mask(6, 6, torch.device("cpu"))
    torch.testing.assert_close(transformer(**given, mask=mask).sample, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_save_and_load(tmp_path):
    transformer = model(action_dim=3, cross_attention_layers=(1,), position_grid=(2, 3))
    transformer.save_pretrained(tmp_path)
    loaded = CausalTransformer3DModel.from_pretrained(tmp_path).eval()
    assert not hasattr(loaded.blocks[0], "attn2")
    assert hasattr(loaded.blocks[1], "attn2")
    given = inputs(SMALL) | {"timestep": torch.ones(2), "actions": torch.randn(2, 4, 3)}
    assert torch.equal(loaded(**given).sample, transformer(**given).sample)


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_fused_projections_change_rounding_alone_and_no_weight(rows, tmp_path):
    transformer = model(action_dim=3, position_grid=(2, 3))
    given = inputs(SMALL, batch=rows) | {"timestep": torch.full((rows,), 300.0), "actions": torch.randn(rows, 4, 3)}
    before = {name: (value, value.clone()) for name, value in transformer.named_parameters()}
    expected = transformer(**given, window=Window(3)).sample
    transformer.lay_out_weights()
    transformer.lay_out_weights()  # once more changes nothing
    assert all(block.attn1._is_fused() for block in transformer.blocks)
    fused = transformer(**given, window=Window(3)).sample
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=1e-5)
    for name, value in transformer.named_parameters():
        assert value is before[name][0], "optimizers and adapters hold the same parameters"
        assert torch.equal(value, before[name][1])
    transformer.save_pretrained(tmp_path)
    loaded = CausalTransformer3DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**given, window=Window(3)).sample, expected)


@pytest.mark.parametrize("change", ["in place", "moved", "assigned", "adapter", "copied"])
@torch.no_grad()
def test_weights_that_change_after_fusing_are_the_ones_in_use(change):
    transformer, fresh = model(), model()
    given = inputs(SMALL) | {"timestep": torch.ones(2)}
    transformer.lay_out_weights()
    expected = transformer(**given).sample
    linear = transformer.blocks[1].attn1.to_k
    if change == "in place":
        linear.weight.mul_(2)
    elif change == "moved":
        transformer.to(torch.float64).to(torch.float32)
        linear.weight.mul_(2)
    elif change == "assigned":
        state = {name: value.clone() for name, value in transformer.state_dict().items()}
        state["blocks.1.attn1.to_k.weight"] *= 2
        transformer.load_state_dict(state, assign=True)
    elif change == "adapter":

        class Adapter(torch.nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base, self.weight, self.bias = base, base.weight, base.bias

            def forward(self, x):
                return self.base(x) + x @ self.weight.T

        transformer.blocks[1].attn1.to_k = Adapter(linear)
    else:
        transformer = copy.deepcopy(transformer)
        transformer.blocks[1].attn1.to_k.weight.mul_(2)
    fresh.blocks[1].attn1.to_k.weight.mul_(2)
    seen = transformer(**given).sample
    assert error(seen, fresh(**given).sample) < 1e-5
    assert error(seen, expected) > 1e-4


def test_fused_weights_learn():
    transformer, fresh = model(), model()
    transformer.lay_out_weights()
    given = inputs(SMALL) | {"timestep": torch.ones(2)}
    for one in (transformer, fresh):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        one(**given).sample.square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert error(transformer(**given).sample, fresh(**given).sample) < 1e-5


@torch.no_grad()
def test_conditions_of_many_timesteps_are_those_of_each():
    transformer = model(action_dim=3)
    given = inputs(SMALL)
    actions = torch.randn(2, 4, 3)
    for timestep, condition in zip((900.0, 20.0), transformer.conditions([900.0, 20.0], actions)):
        expected = transformer(timestep=torch.full((2,), timestep), actions=actions, **given).sample
        assert error(transformer(timestep=condition, **given).sample, expected) < 1e-5
    with pytest.raises(ValueError, match="actions of width 3, got None"):
        transformer.conditions([900.0], None)


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_remembering_writes_what_a_pass_writes(fused):
    transformer, window = model(action_dim=3, cross_attention_layers=(0,)), Window(4, sinks=1)
    if fused:
        transformer.lay_out_weights()
    caches = [cache_for(transformer, window, 2) for _ in range(2)]
    text = transformer.embed_text(inputs(SMALL)["encoder_hidden_states"])
    for frame in range(6):
        generator = torch.Generator().manual_seed(frame)
        latents, actions = (torch.randn(2, *size, generator=generator) for size in ((4, 1, 4, 6), (1, 3)))
        given = {"text_keys": text, "actions": actions}
        for cache, run in zip(caches, (transformer, transformer.remember)):
            chunk = cache.open([0, 1])
            run(latents, torch.full((2, 1), 20.0), cache=chunk, **given)
            chunk.commit()
        for one, other in ((caches[0].k, caches[1].k), (caches[0].v, caches[1].v)):
            assert torch.equal(one, other)


def test_learns():
    transformer = model(action_dim=3, position_grid=(2, 3)).train()
    given = inputs(SMALL) | {"timestep": torch.ones(2, 4), "actions": torch.randn(2, 4, 3)}
    transformer(**given, window=Window(4)).sample.square().mean().backward()
    silent = [name for name, value in transformer.named_parameters() if value.grad is None or not value.grad.any()]
    assert not silent


@torch.no_grad()
def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="'rms_norm_across_heads', the only kind Wan checkpoints have; got None"):
        model(qk_norm=None)
    given = inputs(SMALL) | {"timestep": torch.ones(2)}
    with pytest.raises(ValueError, match=r"attention_kwargs are not supported, got \['scale'\]"):
        model()(**given, attention_kwargs={"scale": 0.5})
    with pytest.raises(ValueError, match="actions of width 3, got None"):
        model(action_dim=3)(**given)
    with pytest.raises(ValueError, match=r"actions of width 0, got \(2, 4, 3\)"):
        model()(**given, actions=torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="image_dim is None"):
        model()(**given, encoder_hidden_states_image=torch.zeros(2, 10, 10))
    with pytest.raises(ValueError, match="needs a prompt"):
        model()(given["hidden_states"], torch.ones(2))
    with pytest.raises(ValueError, match=r"whole patches of \(1, 2, 2\), got \(2, 4, 4, 4, 5\)"):
        model()(given["hidden_states"][..., :5], torch.ones(2), given["encoder_hidden_states"])
    with pytest.raises(ValueError, match=r"draws \(3, 3\) tokens a frame, got latents for \(2, 3\)"):
        model(position_grid=(3, 3))(**given)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("wanted", ["", "attn1", "attn2.to_q", "ffn"])
@pytest.mark.parametrize("config", ["small", "no cross norm", "patches"])
@torch.no_grad()
def test_rows_that_norms_give_in_eight_bits_are_those_that_products_would_make(monkeypatch, kind, wanted, config):
    """What a GPU does in one pass, done here by the same functions in PyTorch."""
    config = CONFIGS[config] | {"attention_head_dim": 16}
    ours = model(**config)
    assert quantize_linears(ours.blocks, kind, lambda name: wanted in name) > 0
    for each in ours.blocks:
        each.lay_out_weights()
    given = {**inputs(config), "timestep": torch.tensor([300.0, 700.0])}
    plain = ours(**given).sample
    made = []

    def counted(*arguments, **named):
        made.append(named.get("dtype"))
        return norm_modulate(*arguments, **named)

    for module in (block, modulation):
        monkeypatch.setattr(module, "in_one_kernel", lambda x: True)
    monkeypatch.setattr(modulation, "norm_modulate", counted)
    torch.testing.assert_close(ours(**given).sample, plain, atol=2e-5, rtol=1e-4)
    assert (kind in made) == (wanted in ("", "attn1"))
