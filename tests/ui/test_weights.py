"""`millstream info --model FILE`: what a file of weights alone is, and how it is run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from millstream.models.transformer import CausalTransformer3DModel
from millstream.ui import cli

TESTS = Path(__file__).resolve().parent.parent


def helpers(path):
    spec = importlib.util.spec_from_file_location("helpers", TESTS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def published():
    """Small weights in original names."""
    checkpoints = helpers("models/checkpoints/conftest.py")
    torch.manual_seed(0)
    return checkpoints.original_names(CausalTransformer3DModel(**checkpoints.CONFIG).state_dict())


def told(capsys, path, *words):
    code = cli.main(["info", "--model", str(path), *words])
    out, err = capsys.readouterr()
    return (out, json.loads(out)) if code == 0 and "--json" in words else (code, out + err)


@pytest.mark.parametrize(
    ("dialect", "wrap", "recipe"),
    [
        ("self_forcing", lambda named, model: {"generator": model, "generator_ema": model}, "self_forcing"),
        ("causvid", lambda named, model: {"generator": model}, "causvid"),
        ("streamdiffusion_v2", lambda named, model: {"state_dict": model}, "streamdiffusion_v2"),
        ("krea", lambda named, model: model, "krea"),
        ("original", lambda named, model: named, None),
    ],
)
def test_a_checkpoint_alone_is_told_with_what_it_takes_to_run_it(dialect, wrap, recipe, published, capsys, tmp_path):
    stored = wrap(published, {f"model.{name}": value for name, value in published.items()})
    torch.save(stored, tmp_path / "some.pt")
    _, report = told(capsys, tmp_path / "some.pt", "--json")
    assert (report["dialect"], report["blocks"], report["width"]) == (dialect, 2, 256)
    assert report["parameters"] == sum(value.numel() for value in published.values())
    assert report["missing"] == ["vae", "text_encoder", "tokenizer"]
    assert (report["recipes"] or [None])[0] == recipe
    code, text = told(capsys, tmp_path / "some.pt")
    assert code == 0
    assert f"some.pt: a transformer, {dialect} weights, 2 blocks 256 wide" in text
    assert "to run it takes vae, text_encoder, tokenizer from a model's folder or repository:" in text
    assert f"--model FOLDER --checkpoint {tmp_path}/some.pt --recipe {recipe or 'RECIPE'}" in text
    if recipe is None:
        assert "its form does not tell by which recipe it is run" in text
    assert "--recipe longlive" in told(capsys, tmp_path / "some.pt", "--recipe", "longlive")[1]


def test_published_sizes_name_the_repository_that_has_the_rest(capsys, tmp_path):
    keys = json.loads((TESTS / "models/checkpoints/data/wan13b_keys.json").read_text())
    shapes = keys if isinstance(keys, dict) else dict(keys)
    weights = {f"model.{name}": torch.zeros(1, dtype=torch.bfloat16).expand(shape) for name, shape in shapes.items()}
    torch.save({"generator_ema": weights}, tmp_path / "dmd.pt")  # which stores one number for each
    code, text = told(capsys, tmp_path / "dmd.pt")
    assert code == 0, text
    assert "self_forcing weights, 30 blocks 1536 wide, 1.42 billion parameters, 2.84 GB in bfloat16" in text
    assert "from a model's folder or repository, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers:" in text


def test_adapters_and_other_parts_are_told(published, capsys, tmp_path):
    layer = "base_model.model.blocks.0.self_attn.q"
    pair = {f"{layer}.lora_A.weight": torch.ones(4, 256), f"{layer}.lora_B.weight": torch.ones(256, 4)}
    torch.save({"generator_lora": pair}, tmp_path / "lora.pt")
    assert "an adapter (lora) of 1 layers and rank 4" in told(capsys, tmp_path / "lora.pt")[1]
    assert f"--lora {tmp_path}/lora.pt --recipe longlive" in told(capsys, tmp_path / "lora.pt")[1]
    checkpoints, video = helpers("models/checkpoints/conftest.py"), helpers("pipelines/video/conftest.py")
    save_file(checkpoints.original_text_names(video.make_parts()["text_encoder"]), tmp_path / "t5.safetensors")
    code, text = told(capsys, tmp_path / "t5.safetensors")
    assert code == 0, text
    assert "a text encoder" in text
    assert "it is one part of a model: keep it in the model's folder, as text_encoder/" in text


def test_a_played_model_takes_a_picture_and_clip(capsys, tmp_path):
    checkpoints, game = helpers("models/checkpoints/conftest.py"), helpers("models/checkpoints/test_played.py")
    modules = game.MODULES | {"enable_mouse": True, "mouse_hidden_dim": 32, "keyboard_dim_in": 4}
    shape = {"in_channels": 12, "out_channels": 4, "text_dim": None, "image_dim": 16, "action_modules": modules}
    model = CausalTransformer3DModel(**checkpoints.CONFIG | shape)
    weights = checkpoints.original_names(model.state_dict())
    save_file({f"model.{name}": value.contiguous() for name, value in weights.items()}, tmp_path / "game.safetensors")
    code, text = told(capsys, tmp_path / "game.safetensors")
    assert code == 0, text
    assert "a model that is played" in text
    assert "takes vae, image_encoder from" in text
    assert "millstream run --image start.png" in text
    assert "--recipe matrix_game_2" in text


def test_what_a_file_cannot_be_asked_or_is_not_is_refused(published, capsys, tmp_path):
    torch.save(published, tmp_path / "some.pt")
    code, text = told(capsys, tmp_path / "some.pt", "--size", "480x832")
    assert (code, text.count("\n")) == (2, 1)
    assert "--size is about a whole model, and" in text
    assert "there is no recipe 'krae'" in told(capsys, tmp_path / "some.pt", "--recipe", "krae")[1]
    (tmp_path / "words.pt").write_text("no weights")
    code, text = told(capsys, tmp_path / "words.pt")
    assert (code, text.count("\n")) == (2, 1)
    assert "words.pt is neither a safetensors nor a PyTorch file" in text
    torch.save({"some": torch.zeros(2)}, tmp_path / "other.pt")
    assert "other.pt holds no Wan transformer" in told(capsys, tmp_path / "other.pt")[1]
    torch.save({name: value for name, value in published.items() if name != "head.head.bias"}, tmp_path / "cut.pt")
    assert "do not fit this model: 1 missing: proj_out.bias" in told(capsys, tmp_path / "cut.pt")[1]
