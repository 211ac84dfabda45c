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


def test_info_tells_what_every_preset_takes(folder, capsys):
    assert cli.main(["info", "--model", str(folder), "--preset", "small"]) == 0
    told = capsys.readouterr().out
    assert "preset small, for one stream" in told
    assert "text_encoder, on the host" in told
    assert "--preset exact: 0.00 GB, 0.00 GB once the text encoder is dropped" in told
    assert "--preset small: 0.00 GB, 0.00 GB with image= or video=, and 0.00 GB on the host" in told
    assert cli.main(["info", "--model", str(folder), "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["presets"]
    assert plans["small"]["kv"] < plans["exact"]["kv"] == plans["fast"]["kv"]


def test_info_plans_for_several_streams(folder, capsys):
    plans = []
    for words in ([], ["--streams", "3"]):
        assert cli.main(["info", "--model", str(folder), "--json", *words]) == 0
        plans.append(json.loads(capsys.readouterr().out)["plan"])
    assert plans[1]["kv"] == 4 * plans[0]["kv"], "rows double"
    assert plans[1]["with_inputs"] > plans[1]["total"] > plans[0]["total"]
    assert cli.main(["info", "--model", str(folder), "--streams", "3"]) == 0
    assert "preset exact, for 3 streams:" in capsys.readouterr().out
    assert cli.main(["info", "--streams", "3"]) == 2
    assert "--streams is about a video model" in capsys.readouterr().err


def test_info_says_what_is_missing(folder, capsys, tmp_path):
    torch.save({"blocks.0.attn1.to_q.weight": torch.zeros(2, 2)}, tmp_path / "model.pt")
    assert cli.main(["info", "--model", str(folder), "--checkpoint", str(tmp_path / "model.pt")]) == 2
    assert "are not those of a whole transformer: patch_embedding.weight" in capsys.readouterr().err
    assert cli.main(["info", "--model", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["info", "--model", str(folder), "--size", "big"])
    assert "must be HEIGHTxWIDTH in pixels, such as 480x832, got 'big'" in capsys.readouterr().err


def run(folder, *words, prompt=("a corgi surfs",)):
    return cli.main(["run", *prompt, "--model", str(folder), "--device", "cpu", *map(str, words)])


def film(path, pictures, rate=16):
    from millstream.streaming import Chunk, Recorder

    with Recorder(path, rate=rate) as recorder:
        recorder.write(Chunk("video", torch.rand(pictures, 3, 16, 32), 0, rate, 0, 0.0))
    return path


def test_run_draws_a_clip_from_words(folder, tmp_path, capsys):
    assert run(folder, "--frames", 20, "-o", tmp_path / "clip.mp4") == 0
    assert "20 frames (1.2 s at 16 frames/s)" in capsys.readouterr().out, "of 21, which are drawn in chunks"
    drawn = list(VideoFile(tmp_path / "clip.mp4"))
    assert len(drawn) == 20
    assert drawn[0].shape == (3, 16, 32)


def test_run_redraws_a_video_begins_with_a_picture_and_follows_a_timeline(folder, tmp_path, capsys):
    from PIL import Image

    assert run(folder, "--frames", 21, "-o", tmp_path / "clip.mp4") == 0
    again = ("--video", tmp_path / "clip.mp4", "--strength", 0.5, "-o", tmp_path / "again.mp4")
    assert run(folder, *again) == 0
    assert "again.mp4: 21 frames" in capsys.readouterr().out
    Image.new("RGB", (64, 64), "red").save(tmp_path / "start.png")
    (tmp_path / "shots.json").write_text('[{"at": 0, "prompt": "a fox"}, {"at": 1, "prompt": "snow", "switch": "cut"}]')
    shots = ("--image", tmp_path / "start.png", "--timeline", tmp_path / "shots.json", "-o", tmp_path / "shots.mp4")
    assert run(folder, *shots, "--frames", 30, prompt=()) == 0
    assert "shots.mp4: 30 frames" in capsys.readouterr().out, "13 from the picture on, 12, and 5 of the new shot's 9"
    assert run(folder, *shots) == 2
    assert "the timeline says what to draw; leave the prompt out" in capsys.readouterr().err
    assert run(folder, "--image", tmp_path / "none.png", "-o", tmp_path / "x.mp4") == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.parametrize("pictures", [1, 3, 8, 20])
def test_run_redraws_every_picture_of_a_video(folder, tmp_path, capsys, pictures):
    words = ("--video", film(tmp_path / "film.mp4", pictures), "--strength", 0.5, "-o", tmp_path / "out.mp4")
    assert run(folder, *words) == 0
    assert f"out.mp4: {pictures} frames" in capsys.readouterr().out
    assert len(list(VideoFile(tmp_path / "out.mp4"))) == pictures


@pytest.mark.parametrize("pictures", [1, 12, 20])
def test_run_redraws_a_video_behind_a_picture_one_for_one(folder, tmp_path, capsys, pictures):
    from PIL import Image

    Image.new("RGB", (32, 16), "red").save(tmp_path / "start.png")
    words = ("--video", film(tmp_path / "film.mp4", pictures), "--image", tmp_path / "start.png", "--strength", 0.5)
    assert run(folder, *words, "-o", tmp_path / "out.mp4") == 0
    assert f"out.mp4: {pictures} frames" in capsys.readouterr().out


def test_run_keeps_the_tempo_of_a_video_and_stops_where_it_is_told(folder, tmp_path, capsys):
    words = ("--video", film(tmp_path / "film.mp4", 60, rate=30), "--strength", 0.5, "-o", tmp_path / "out.mp4")
    assert run(folder, *words) == 0
    assert "out.mp4: 32 frames (2.0 s at 16 frames/s)" in capsys.readouterr().out
    assert run(folder, *words, "--frames", 5) == 0
    assert "out.mp4: 5 frames" in capsys.readouterr().out


def test_run_redraws_a_video_by_a_timeline(folder, tmp_path, capsys):
    (tmp_path / "shots.json").write_text('[{"at": 0, "prompt": "a fox"}, {"at": 0.5, "prompt": "snow"}]')
    words = ("--video", film(tmp_path / "film.mp4", 33), "--timeline", tmp_path / "shots.json", "--strength", 0.9)
    assert run(folder, *words, "-o", tmp_path / "shots.mp4", prompt=()) == 0
    assert run(folder, *words[:2], *words[4:], "-o", tmp_path / "fox.mp4", prompt=("a fox",)) == 0
    shots, fox = (torch.stack(list(VideoFile(tmp_path / name))) for name in ("shots.mp4", "fox.mp4"))
    assert len(shots) == len(fox) == 33
    change = (shots - fox).abs().mean((1, 2, 3))
    assert change[:5].max() < change[12:].max() / 2, "the words change once the first chunk, of 9, is drawn"


def test_what_is_no_picture_or_video_is_refused_in_a_sentence(folder, tmp_path, capfd):
    (tmp_path / "words.png").write_text("no picture at all")
    (tmp_path / "cut.mp4").write_bytes(film(tmp_path / "film.mp4", 20).read_bytes()[:400])
    for name in ("words.png", "cut.mp4"):
        assert run(folder, "--image", tmp_path / name, "-o", tmp_path / "out.mp4") == 2
        assert f"{name} is no picture or video that can be read\n" in capfd.readouterr().err
        assert run(folder, "--video", tmp_path / name, "-o", tmp_path / "out.mp4") == 2
        err = capfd.readouterr().err
        assert f"{name} is not a video that OpenCV can read" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keys", "KeyW"], "--keys is for worlds and video models that are played; this model is none of them"),
        (["--steps", "3"], "--steps is for worlds"),
        (["--strength", "0"], "--strength is how far --video is redrawn"),
    ],
)
def test_run_refuses_what_a_video_model_does_not_read(folder, tmp_path, capsys, words, message):
    assert run(folder, "--frames", 2, "-o", tmp_path / "out.mp4", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.mp4").exists()


def test_run_knows_a_wan_folder_as_it_is_released(tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    assert run(tmp_path, "-o", tmp_path / "out.mp4") == 2
    assert "does not say how its weights are run; give recipe=" in capsys.readouterr().err


def test_a_file_is_no_model(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    file = "transformer/diffusion_pytorch_model.safetensors"
    for words in (["run", "x"], ["run", "x", "--recipe", "longlive"]):
        assert cli.main([*words, "--model", file]) == 2
        told = capsys.readouterr().err
        assert f"{file} is a file, a model is a folder; give weights in a file as --checkpoint" in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{bad", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1]", "must hold an object, got a list"),
        ('{"_class_name": []}', r"must name a class in _class_name, got []"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, capsys, text, message):
    (tmp_path / "model_index.json").write_text(text)
    for words in (["info"], ["run", "x", "-o", str(tmp_path / "out.mp4")]):
        assert cli.main([*words, "--model", str(tmp_path)]) == 2
        assert f"model_index.json {message}" in capsys.readouterr().err


def test_live_redraws_a_video_with_a_video_model(folder, tmp_path, capsys):
    film = tmp_path / "film.mp4"
    assert run(folder, "--frames", 21, "-o", film) == 0
    capsys.readouterr()
    words = ["live", "--video", str(film), "--model", str(folder), "--device", "cpu", "--prompt", "a corgi surfs"]
    out = tmp_path / "out.mp4"
    assert cli.main([*words, "--strength", "0.6", "-o", str(out)]) == 0
    assert "out.mp4: 21 frames (1.3 s at 16 frames/s)" in capsys.readouterr().out, "one for each, none twice"
    assert cli.main([*words, "--strength", "0.6", "-o", str(out), "--seconds", "0.75"]) == 0
    assert "out.mp4: 12 frames (0.8 s at 16 frames/s)" in capsys.readouterr().out, "9, and 3 of a chunk of 12"
    assert VideoFile(out).read().data.shape == (3, 64, 128)


def test_live_shows_a_video_model_in_step_with_its_source(folder, tmp_path, capsys, monkeypatch):
    from millstream.streaming import Chunk, Recorder

    shown = []
    film = tmp_path / "film.mp4"
    with Recorder(film, rate=25) as recorder:
        recorder.write(Chunk("video", torch.rand(50, 3, 16, 32), 0, 25, 0, 0.0))

    class Screen:
        closed = False

        def steers(self, session, worlds):
            assert worlds == ()

        def write(self, chunk):
            shown.append(chunk)

        def close(self): ...

    monkeypatch.setattr("millstream.ui.commands.live.SteeringWindow", Screen)
    words = ["live", "--video", str(film), "--model", str(folder), "--device", "cpu", "--prompt", "a corgi surfs"]
    assert cli.main(words) == 0
    pictures = sum(len(chunk.data) for chunk in shown)
    assert pictures == pytest.approx(32, abs=3), "two seconds at the model's own 16 a second"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to draw with --prompt"),
        (["--prompt", "a fox", "--stream-batch"], "--stream-batch is for worlds"),
        (["--prompt", "a fox", "--steps", "3"], "--steps is for worlds"),
        (["--prompt", "a fox", "--recipe", "krae"], "there is no recipe 'krae'"),
        (["--prompt", "a fox", "--preset", "slow"], "there is no preset 'slow'; there are exact, fast, small"),
    ],
)
def test_what_a_video_model_has_not_is_refused(folder, tmp_path, capsys, words, message):
    from millstream.streaming import Chunk, Recorder

    with Recorder(tmp_path / "in.mp4", rate=25) as recorder:
        recorder.write(Chunk("video", torch.rand(2, 3, 16, 32), 0, 25, 0, 0.0))
    asked = ["live", "--video", str(tmp_path / "in.mp4"), "-o", str(tmp_path / "out.mp4"), "--model", str(folder)]
    assert cli.main([*asked, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_clip_of_a_video_model_for_the_page(folder, tmp_path):
    from PIL import Image

    from millstream.pipelines.video import VideoPipeline
    from millstream.ui.page.clips import ClipRequest, make_clip

    pipe, told = VideoPipeline.from_pretrained(folder), []

    def clip(**changes):
        request = ClipRequest(**{"prompt": "a corgi surfs", "num_frames": 13, **changes})
        return make_clip(pipe, request, tmp_path / "c.mp4", most=40, progress=lambda *at: told.append(at))[0]

    assert clip() == 13
    assert told[-1] == (13, 13)
    Image.new("RGB", (64, 32), "red").save(tmp_path / "red.png")
    assert clip(upload=tmp_path / "red.png") == 13
    first = VideoFile(tmp_path / "c.mp4").read().data.mean((1, 2))
    assert first[0] > first[2] + 0.1, "it begins with the picture"
    (tmp_path / "c.mp4").rename(tmp_path / "film.mp4")
    assert clip(upload=tmp_path / "film.mp4", strength=0.5, num_frames=0) == 13, "though a chunk takes 9, then 12"
    for changes in ({"keys": "KeyW"}, {"num_inference_steps": 4}, {"guidance_scale": 3.0}):
        with pytest.raises(ValueError, match=r"has no keys|fixed by this model's recipe"):
            clip(**changes)


def test_the_page_counts_a_video_model_in_the_way_it_would_be_loaded(folder):
    from millstream.ui.page.memory import memory_plan

    usual, longer = memory_plan(str(folder)), memory_plan(str(folder), "self_forcing")
    assert usual.weights["transformer"] == longer.weights["transformer"]
    assert longer.cache > usual.cache, "21 frames instead of 12"
    assert usual.weights["pictures that come in"] > 0, "which the page takes"
    assert "there is no recipe" in memory_plan(str(folder), "krae").note
