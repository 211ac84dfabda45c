"""Packed weights: a quarter of the room, and after loading exactly the rounded model, nothing else."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from millstream.models.frame_codec import FrameAutoencoder
from millstream.models.packed import FILE, SMALLEST, is_packed, pack
from millstream.models.text_encoder import ByteTextEncoder
from millstream.models.transformer import CausalTransformer3DModel


def tiny(seed=0):
    torch.manual_seed(seed)
    return CausalTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=96,
        num_layers=2,
        action_dim=7,
        position_grid=(2, 3),
    ).eval()


def rounded(model):
    """The state that packing should leave, written down a second time: the definition, not the implementation."""
    state = {}
    for name, value in model.state_dict().items():
        if value.ndim >= 2 and value.numel() >= SMALLEST:
            flat = value.reshape(value.shape[0], -1)
            scale = flat.abs().amax(1, keepdim=True) / 127
            state[name] = ((flat / scale).round() * scale).nan_to_num(0).reshape(value.shape)  # a row may be all zero
        else:
            state[name] = value.half().float()
    return state


def inputs():
    torch.manual_seed(9)
    return {
        "hidden_states": torch.randn(1, 4, 2, 4, 6),
        "timestep": torch.tensor([[700.0, 20.0]]),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "actions": torch.eye(7)[None, :2],
    }


@pytest.fixture
def packed(tmp_path):
    model = tiny()
    model.save_packed(tmp_path / "packed")
    return model, tmp_path / "packed"


@pytest.mark.parametrize(
    "model", [tiny(), FrameAutoencoder(4, (16, 32, 48)), ByteTextEncoder(32, 4, 1, 2)], ids=lambda m: type(m).__name__
)
def test_a_packed_model_is_the_rounded_model_to_the_bit(model, tmp_path):
    model.save_packed(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    expected, state = rounded(model), loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], expected[name]) and state[name].dtype == torch.float32 for name in state)
    assert any((state[name] != value).any() for name, value in model.state_dict().items()), "something was rounded"
    assert not loaded.training
    settings = [json.dumps({k: v for k, v in m.config.items() if k[0] != "_"}) for m in (model, loaded)]
    assert settings[0] == settings[1]


def test_what_a_packed_model_draws_is_near_the_original_and_equals_the_rounded_one(packed):
    model, folder = packed
    original = model(**inputs()).sample
    loaded = CausalTransformer3DModel.from_pretrained(folder)(**inputs()).sample
    model.load_state_dict(rounded(model))
    assert torch.equal(loaded, model(**inputs()).sample)
    assert 0 < (loaded - original).norm() / original.norm() < 0.02


def test_packing_rounds_every_channel_by_its_own_scale():
    value = torch.randn(6, 5, 3) * torch.tensor([1e-6, 1e-3, 1, 1e3, 1e6, 0]).view(6, 1, 1)
    integers, scale = pack(value)
    assert integers.dtype == torch.int8
    assert integers[:5].abs().flatten(1).amax(1).tolist() == [127] * 5
    error = (integers * scale - value).abs().flatten(1).amax(1)
    assert torch.all(error <= value.abs().flatten(1).amax(1) / 250)


def test_a_packed_file_takes_about_a_quarter(packed, tmp_path):
    model, folder = packed
    model.save_pretrained(tmp_path / "plain")
    assert is_packed(folder / FILE)
    assert not is_packed(tmp_path / "plain" / FILE)
    assert (folder / FILE).stat().st_size < 0.33 * (tmp_path / "plain" / FILE).stat().st_size


def test_loading_twice_and_packing_again_changes_nothing(packed, tmp_path):
    _, folder = packed
    loaded = CausalTransformer3DModel.from_pretrained(folder)
    loaded.save_packed(tmp_path / "again")
    again = CausalTransformer3DModel.from_pretrained(tmp_path / "again").state_dict()
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("argument", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("form", ["plain", "packed"])
def test_bfloat16_leaves_the_sensitive_parts_in_full_precision(packed, tmp_path, form, argument):
    model, folder = packed
    if form == "plain":
        folder = tmp_path / "plain"
        model.save_pretrained(folder)
    exact = CausalTransformer3DModel.from_pretrained(folder).state_dict()
    half = CausalTransformer3DModel.from_pretrained(folder, **{argument: torch.bfloat16})
    assert half.dtype == torch.bfloat16
    kept = set()
    for name, value in half.state_dict().items():
        if set(name.split(".")) & set(half._keep_in_fp32_modules):
            kept.add(name)
            assert value.dtype == torch.float32, name
            assert torch.equal(value, exact[name]), f"{name} went through bfloat16"
        else:
            assert value.dtype == torch.bfloat16, name
            assert torch.equal(value, exact[name].bfloat16())
    assert {
        "scale_shift_table",
        "blocks.0.scale_shift_table",
        "condition_embedder.time_embedder.linear_1.weight",
    } <= kept


def test_a_subfolder_is_found(packed):
    _, folder = packed
    loaded = CausalTransformer3DModel.from_pretrained(folder.parent, subfolder=folder.name)
    assert torch.equal(loaded.proj_out.weight, CausalTransformer3DModel.from_pretrained(folder).proj_out.weight)


@pytest.mark.parametrize("form", ["plain", "packed"])
@pytest.mark.parametrize("keep", [0, 6, 100, 5000])
def test_a_file_that_was_cut_short_is_refused(packed, form, keep):
    model, folder = packed
    if form == "plain":
        model.save_pretrained(folder)
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[:keep])
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        CausalTransformer3DModel.from_pretrained(folder)


def test_another_models_packed_weights_are_refused(packed):
    _, folder = packed
    ByteTextEncoder(32, 4, 1, 2).save_packed(folder.parent / "other")
    (folder.parent / "other" / FILE).replace(folder / FILE)
    with pytest.raises(ValueError, match=r"not a CausalTransformer3DModel of its config: \d+ missing .* unknown"):
        CausalTransformer3DModel.from_pretrained(folder)


def test_a_packed_tensor_of_another_shape_is_refused(packed):
    _, folder = packed
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"action_dim": 5}))
    with pytest.raises(ValueError, match=r"1 missing or of another shape \(action_embedder.weight\)"):
        CausalTransformer3DModel.from_pretrained(folder)


def test_plain_weights_that_lack_something_are_refused_instead_of_drawn_at_random(tmp_path):
    tiny().save_pretrained(tmp_path)
    weights = load_file(tmp_path / FILE)
    del weights["blocks.1.attn1.to_q.weight"]
    save_file(weights, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing or of another shape \(blocks.1.attn1.to_q.weight\)"):
        CausalTransformer3DModel.from_pretrained(tmp_path)


def test_missing_files_are_named(packed, tmp_path):
    _, folder = packed
    with pytest.raises(OSError, match="nowhere"):
        CausalTransformer3DModel.from_pretrained(tmp_path / "nowhere")
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match=r"no config\.json beside it"):
        CausalTransformer3DModel.from_pretrained(folder)
    tiny().save_config(folder)
    (folder / FILE).unlink()
    with pytest.raises(OSError, match=FILE):
        CausalTransformer3DModel.from_pretrained(folder)


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def test_a_pickle_is_never_opened(packed):
    _, folder = packed
    (folder / FILE).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(OSError, match=FILE):
        CausalTransformer3DModel.from_pretrained(folder)
    (folder / FILE).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        CausalTransformer3DModel.from_pretrained(folder)
