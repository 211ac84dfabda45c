"""Every publication of the same weights loads to the same model; what is no such publication is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from millstream.models.checkpoints import load_transformer, open_checkpoint
from millstream.models.checkpoints.names import transformer_name

CONFIG = ("num_attention_heads", "attention_head_dim", "in_channels", "text_dim", "freq_dim", "ffn_dim", "num_layers")


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def shifted(state):
    """Other weights of the same names: what must not be taken."""
    return {name: value + 1 for name, value in state.items()}


def published(dialect, state, original):
    """What the file of each publication holds."""
    names = original(state)
    if dialect == "diffusers":
        return dict(state)
    if dialect == "original":
        return names
    if dialect == "self_forcing":
        return {"generator": prefixed(shifted(names), "model."), "generator_ema": prefixed(names, "model.")}
    if dialect == "causvid":
        return {"generator": prefixed(names, "model.")}
    if dialect == "streamdiffusion_v2":
        return {"state_dict": names}
    if dialect == "krea":
        return prefixed(names, "model.")
    if dialect == "self_forcing under fsdp":
        wrapped = {
            "model._fsdp_wrapped_module." + name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): value
            for name, value in names.items()
        }
        return {"generator": prefixed(shifted(names), "model."), "generator_ema": wrapped}
    raise AssertionError(dialect)


DIALECTS = [
    "diffusers",
    "original",
    "self_forcing",
    "causvid",
    "streamdiffusion_v2",
    "krea",
    "self_forcing under fsdp",
]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_pt_of_every_dialect_draws_the_same(dialect, transformer, original, draw, tmp_path):
    path = tmp_path / "some_name.bin"
    torch.save(published(dialect, transformer.state_dict(), original), path)
    assert open_checkpoint(path).dialect == dialect.split()[0]
    loaded = load_transformer(path)
    assert {name: loaded.config[name] for name in CONFIG} == {name: transformer.config[name] for name in CONFIG}
    assert torch.equal(draw(loaded), draw(transformer))


@pytest.mark.parametrize("dialect", ["diffusers", "original", "krea"])
def test_safetensors_of_every_flat_dialect_draw_the_same(dialect, transformer, original, draw, tmp_path):
    path = tmp_path / "weights"
    save_file({k: v.contiguous() for k, v in published(dialect, transformer.state_dict(), original).items()}, path)
    assert open_checkpoint(path).dialect == dialect
    assert torch.equal(draw(load_transformer(path)), draw(transformer))


def test_the_average_is_taken_unless_the_other_is_asked_for(transformer, original, tmp_path):
    torch.save(published("self_forcing", transformer.state_dict(), original), tmp_path / "model.pt")
    names = open_checkpoint(tmp_path / "model.pt").weights
    raw = open_checkpoint(tmp_path / "model.pt", ema=False).weights
    assert torch.equal(names["proj_out.weight"], transformer.proj_out.weight)
    assert torch.equal(raw["proj_out.weight"], transformer.proj_out.weight + 1)


def test_image_to_video_weights_draw_the_same(image_transformer, original, draw, tmp_path):
    torch.save(original(image_transformer.state_dict()), tmp_path / "model.pt")
    loaded = load_transformer(tmp_path / "model.pt")
    assert loaded.config.image_dim == 20
    assert loaded.config.added_kv_proj_dim == 256
    assert torch.equal(draw(loaded), draw(image_transformer))


def test_a_folder_of_shards_draws_the_same(transformer, draw, tmp_path):
    transformer.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    torch.testing.assert_close(
        draw(load_transformer(tmp_path)), draw(transformer), atol=1e-5, rtol=0
    )  # laid out otherwise
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of \d files: diffusion_pytorch_model-"):
        load_transformer(tmp_path)


def test_a_folder_as_wan_releases_it_draws_the_same(transformer, original, draw, tmp_path):
    config = {"model_type": "t2v", "dim": 256, "num_heads": 2, "ffn_dim": 40, "in_dim": 16, "out_dim": 16}
    config |= {"freq_dim": 32, "num_layers": 2, "eps": 1e-6, "text_len": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(original(transformer.state_dict()), tmp_path / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(
        draw(load_transformer(tmp_path)), draw(transformer), atol=1e-5, rtol=0
    )  # laid out otherwise


def test_half_precision_leaves_norms_and_modulation_alone(transformer, tmp_path):
    torch.save(transformer.state_dict(), tmp_path / "model.pt")
    loaded = load_transformer(tmp_path / "model.pt", torch_dtype=torch.bfloat16)
    assert loaded.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    for precise in (loaded.blocks[0].scale_shift_table, loaded.blocks[0].norm2.weight, loaded.scale_shift_table):
        assert precise.dtype == torch.float32


def test_missing_and_unexpected_names_are_listed(transformer, original, tmp_path):
    names = original(transformer.state_dict())
    del names["blocks.1.ffn.2.bias"]
    names["blocks.1.vace.weight"] = torch.zeros(1)
    torch.save(names, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="do not fit this model") as refusal:
        load_transformer(tmp_path / "model.pt")
    assert "1 missing: blocks.1.ffn.net.2.bias" in str(refusal.value)
    assert "1 unexpected: blocks.1.vace.weight" in str(refusal.value)


def test_weights_of_another_size_are_refused_with_both_shapes(transformer, tmp_path):
    torch.save(transformer.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"norm_k.weight \(256,\) instead of \(384,\), .* and 60 more"):
        load_transformer(tmp_path / "model.pt", config=dict(transformer.config) | {"num_attention_heads": 3})


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("sprung"),))


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(transformer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"generator": Trap()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds more than tensors, which could run code, and is refused"):
        load_transformer(tmp_path / "model.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "only a Git LFS pointer"),
        (b"<!DOCTYPE html>", "neither a safetensors nor a PyTorch file"),
        (b"", "neither a safetensors nor a PyTorch file"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{broken header!!", "damaged or was cut short"),
        (b"PK\x03\x04 and no more", "damaged or no checkpoint"),
        (b"\x80\x02}q\x01(U", "damaged or no checkpoint"),
        (b"\x80\x02h\x07.", "damaged or no checkpoint"),
    ],
)
def test_files_that_are_no_weights_are_refused(content, message, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_transformer(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.zeros(1)}, r"model.pt is no checkpoint: 0 is not the name of a tensor"),
        ({"patch_embedding.weight": torch.tensor(1.0)}, r"patch_embedding.weight \(\) is not of 5 dimensions"),
        ({"time_embedding.0.weight": torch.zeros(3)}, r"linear_1.weight \(3,\) is not of 2 dimensions"),
        ({"blocks.x.foo": torch.zeros(3)}, r"1 unexpected: blocks.x.foo"),
        ({"blocks.999999999.foo": torch.zeros(3)}, r"name layer 999999999 of blocks, and are only \d+"),
        ({"head.head.bias": torch.zeros(64, dtype=torch.int8)}, r"proj_out.bias is torch.strided torch.int8"),
        ({"head.head.bias": torch.zeros(64).to_sparse()}, r"proj_out.bias is torch.sparse_coo"),
        ({"blocks.0.action_model.t_qkv.weight": torch.zeros(3)}, r"blocks.0.action_model are not whole"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_strange_tensors_are_refused(changes, message, transformer, original, tmp_path):
    torch.save({**original(transformer.state_dict()), **changes}, tmp_path / "model.pt")
    for headers_only in (False, True):
        with pytest.raises(ValueError, match=message):
            load_transformer(tmp_path / "model.pt", headers_only=headers_only)


def test_a_dictionary_that_holds_itself_is_refused(tmp_path):
    within: dict = {}
    within["model"] = within
    torch.save(within, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds no Wan transformer"):
        load_transformer(tmp_path / "model.pt")


def test_numbers_of_an_unknown_kind_are_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(ValueError, match=r"model.safetensors has numbers of an unknown kind: F4"):
        load_transformer(tmp_path / "model.safetensors", headers_only=True)


@pytest.mark.parametrize("text", ["{broken", "[" * 200_000, "[1]", "\udcff"])
def test_damaged_json_is_refused_by_its_name(text, transformer, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    torch.save(transformer.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"config.json (is damaged|holds a list, not settings by name)"):
        load_transformer(tmp_path / "model.pt")


def test_a_config_beside_is_believed_where_shapes_say_nothing(transformer, original, draw, tmp_path):
    """And only if it is as wide: the folder may be another model's."""
    torch.save(original(transformer.state_dict()), tmp_path / "model.pt")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 9, "eps": 1e-3}))
    config = load_transformer(tmp_path / "model.pt").config
    assert (config["num_attention_heads"], config["num_layers"], config["eps"]) == (4, 2, 1e-3)
    path.write_text(json.dumps({"num_attention_heads": 4, "attention_head_dim": 128, "num_layers": 9, "eps": 1e-3}))
    assert torch.equal(draw(load_transformer(tmp_path / "model.pt")), draw(transformer))
    path.write_text(json.dumps({"dim": 1536, "num_heads": 12, "ffn_dim": 8960, "in_dim": 16, "num_layers": 30}))
    assert torch.equal(draw(load_transformer(tmp_path / "model.pt")), draw(transformer))


def test_what_is_no_transformer_is_told_by_its_names(vae, tmp_path):
    torch.save(vae.state_dict(), tmp_path / "vae.pth")
    with pytest.raises(ValueError, match=r"holds no Wan transformer: .*but encoder.conv_in.weight"):
        load_transformer(tmp_path / "vae.pth")


def test_missing_files_and_folders_with_several_are_refused(transformer, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no weight file"):
        load_transformer(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="no weights in the folder"):
        load_transformer(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save({}, tmp_path / name)
    with pytest.raises(ValueError, match=r"several weight files \(a.pt, b.pt\); name the one to load"):
        load_transformer(tmp_path)


def test_an_index_cannot_reach_out_of_its_folder(tmp_path):
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(ValueError, match=r"points outside its folder: \.\./a"):
        load_transformer(tmp_path)


def test_the_full_1_3b_model_has_exactly_the_published_tensors():
    """All 825 names and shapes of the original file, on the meta device."""
    listed = json.loads((Path(__file__).parent / "data" / "wan13b_keys.json").read_text())
    with torch.device("meta"):
        weights = {transformer_name(name): torch.empty(shape) for name, shape in listed.items()}
    from millstream.models.checkpoints.load import check_names, config_from_shapes
    from millstream.models.transformer import CausalTransformer3DModel

    config = config_from_shapes(weights)
    assert (config["num_attention_heads"], config["ffn_dim"], config["num_layers"]) == (12, 8960, 30)
    with torch.device("meta"):
        model = CausalTransformer3DModel(**config)
    check_names({name: tuple(value.shape) for name, value in model.state_dict().items()}, weights, "the list")
    assert len(weights) == 825
    assert sum(value.numel() for value in weights.values()) == 1_418_996_800


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ({"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}, 14_288_491_584),
        ({"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}, None),
        ({"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}, None),
    ],
)
def test_larger_models_are_told_by_their_shapes(size, parameters, original):
    """14B (Krea's too), TI2V 5B and I2V 14B: original names alone give back the whole config."""
    from millstream.models.checkpoints.load import check_names, config_from_shapes
    from millstream.models.transformer import CausalTransformer3DModel

    with torch.device("meta"):
        model = CausalTransformer3DModel(**size)
    weights = {transformer_name(name): value for name, value in original(model.state_dict()).items()}
    config = config_from_shapes(weights)
    assert {name: config[name] for name in size} == size
    with torch.device("meta"):
        again = CausalTransformer3DModel(**config)
    check_names({name: tuple(value.shape) for name, value in again.state_dict().items()}, weights, "the model")
    assert parameters in (None, sum(value.numel() for value in weights.values()))


def test_names_are_those_of_diffusers_own_converter():
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    listed = json.loads((Path(__file__).parent / "data" / "wan13b_keys.json").read_text())
    image = [f"blocks.0.cross_attn.{part}.weight" for part in ("k_img", "v_img", "norm_k_img")]
    for name in [*listed, *image, *(f"img_emb.proj.{i}.bias" for i in (0, 1, 3, 4))]:
        assert [transformer_name(name)] == list(convert_wan_transformer_to_diffusers({name: 0}))
