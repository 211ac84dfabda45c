"""`millstream info --model` and `millstream run` with a video model, on one of toy size."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from millstream.streaming import VideoFile
from millstream.ui import cli

HELPERS = Path(__file__).resolve().parent.parent / "pipelines" / "video" / "conftest.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in diffusers' layout."""
    spec = importlib.util.spec_from_file_location("video_helpers", HELPERS)
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    folder = tmp_path_factory.mktemp("model")
    helpers.make_pipe("longlive").save_pretrained(folder)
    return folder


def test_info_tells_what_a_model_is_and_takes(folder, capsys):
    assert cli.main(["info", "--model", str(folder), "--dtype", "float32"]) == 0
    told = capsys.readouterr().out
    assert "diffusers weights" in told
    assert "recipe longlive: timesteps 1000, 750, 500, 250, chunks of 3, window 12, 3 sinks" in told
    assert "keys and values" in told
    assert "memory at 16 x 32 in float32" in told


def test_info_as_json_and_for_another_checkpoint_recipe_and_size(folder, capsys, tmp_path):
    from safetensors.torch import load_file

    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    torch.save({"generator": weights, "generator_ema": weights}, tmp_path / "model.pt")
    words = ["--checkpoint", str(tmp_path / "model.pt"), "--recipe", "krea", "--size", "32x48", "--dtype", "bfloat16"]
    assert cli.main(["info", "--model", str(folder), "--json", *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dialect"] == "diffusers"
    assert report["recipe"]["name"] == "krea"
    assert report["size"] == [32, 48]
    assert report["plan"]["total"] > report["plan"]["without_text_encoder"] > 0


def test_info_says_what_is_missing(folder, capsys, tmp_path):
    torch.save({"blocks.0.attn1.to_q.weight": torch.zeros(2, 2)}, tmp_path / "model.pt")
    assert cli.main(["info", "--model", str(folder), "--checkpoint", str(tmp_path / "model.pt")]) == 2
    assert "do not fit this model" in capsys.readouterr().err
    assert cli.main(["info", "--model", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["info", "--model", str(folder), "--size", "big"])
    assert "must be HEIGHTxWIDTH in pixels, such as 480x832, got 'big'" in capsys.readouterr().err


def run(folder, *words):
    return cli.main(["run", "a corgi surfs", "--model", str(folder), "--device", "cpu", *map(str, words)])


def test_run_draws_a_clip_from_words(folder, tmp_path, capsys):
    assert run(folder, "--frames", 20, "-o", tmp_path / "clip.mp4") == 0
    assert "21 frames (1.3 s at 16 frames/s)" in capsys.readouterr().out
    assert VideoFile(tmp_path / "clip.mp4").read().data.shape == (3, 16, 32)


def test_run_redraws_a_video_begins_with_a_picture_and_follows_a_timeline(folder, tmp_path, capsys):
    from PIL import Image

    assert run(folder, "--frames", 21, "-o", tmp_path / "clip.mp4") == 0
    again = ("--video", tmp_path / "clip.mp4", "--strength", 0.5, "-o", tmp_path / "again.mp4")
    assert run(folder, *again) == 0
    assert "again.mp4: 21 frames" in capsys.readouterr().out
    Image.new("RGB", (64, 64), "red").save(tmp_path / "start.png")
    (tmp_path / "shots.json").write_text('[{"at": 0, "prompt": "a fox"}, {"at": 1, "prompt": "snow", "switch": "cut"}]')
    shots = ("--image", tmp_path / "start.png", "--timeline", tmp_path / "shots.json", "-o", tmp_path / "shots.mp4")
    assert run(folder, *shots, "--frames", 30) == 0
    assert "shots.mp4: 34 frames" in capsys.readouterr().out, "13 from the picture on, 12, and 9 of the new shot"
    assert run(folder, "--image", tmp_path / "none.png", "-o", tmp_path / "x.mp4") == 2
    assert "there is no file" in capsys.readouterr().err
