"""The command line as a user meets it: what is written, what is said, which exit code."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from millstream.ui import cli
from millstream.ui.commands import demo


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def colours(path: Path) -> np.ndarray:
    """Mean colour of each frame [T, 3] in 0..1."""
    return iio.imread(path, plugin="FFMPEG").mean(axis=(1, 2)) / 255


def test_run_writes_the_walk_that_the_keys_describe(world, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["run", "a brick corridor", "--keys", "KeyW*4 -*2", "--frames", "12", "-o", "walk.mp4", "--seed", "7"]
    assert cli.main([*words, "--steps", "3"]) == 0
    assert world.asked == {"prompt": "a brick corridor", "seed": 7, "steps": 3}
    green = colours(tmp_path / "walk.mp4")[:, 1]
    assert (green > 0.5).tolist() == [True] * 4 + [False] * 2 + [True] * 4 + [False] * 2
    out, err = capsys.readouterr()
    assert "walk.mp4: 12 frames (0.7 s at 17.5 frames/s), drawn at" in out
    assert "nearest world" not in err


def test_run_under_a_planner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", "a brick corridor", "--frames", "2", "--device", "cpu", "-o"]
    assert cli.main([*words, "all.mp4"]) == 0
    assert cli.main([*words, "near.mp4", "--attention", "window(1,1,1)"]) == 0
    assert abs(colours(tmp_path / "all.mp4") - colours(tmp_path / "near.mp4")).max() > 1e-3
    capsys.readouterr()
    assert cli.main([*words, "wrong.mp4", "--attention", "windows(1,1,1)"]) == 2
    assert 'attention must be like "window(3, 24, 24)"' in capsys.readouterr().err


def test_run_length_in_seconds(world, tmp_path: Path) -> None:
    assert cli.main(["run", "a brick corridor", "--seconds", "2"]) == 0
    assert len(colours(tmp_path / "walk.mp4")) == 35


def test_a_prompt_far_from_every_world_is_drawn_and_told(world, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["run", "a tea party", "--frames", "2"]) == 0
    assert 'nearest world: "a brick corridor" (0.21)' in capsys.readouterr().err


def test_demo_walks_and_switches_world_half_way(world, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["demo"]) == 0
    seen = colours(tmp_path / "demo.mp4")
    assert len(seen) == 350  # 20 s at 17.5 frames/s
    assert (seen[:, 2] > 0.5).tolist() == [False] * 175 + [True] * 175
    assert str(tmp_path / "demo.mp4") in capsys.readouterr().out
    prompts = [control.prompt for control in world.seen]
    assert [later for earlier, later in pairwise(prompts) if later != earlier] == [demo.PROMPTS[1]]


def test_bench_prints_json(world, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["bench", "--json", "--frames", "30"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["frames"] == 30
    assert report["frames_per_second"] > 0
    assert 0 < report["step_p50"] <= report["step_p95"] <= report["step_p99"]
    assert report["peak_memory"] > 10**7
    assert report["machine"]["cores"] >= 1
    assert report["versions"]["torch"]


def test_info_for_people_and_for_programs(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] in text
    assert report["machine"]["processor"] in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", ""], "the prompt is empty"),
        (["run", " \t"], "the prompt is empty"),
        (["run", "x" * 10_000], "prompt has 10,000 characters; at most"),
        (["run", "x", "--keys", "KeyQ*3"], "unknown key 'KeyQ': .*valid keys are ArrowLeft, .*Space, and - for none"),
        (["run", "x", "--keys", "KeyW*0"], "the count in 'KeyW[*]0' must be between"),
        (["run", "x", "--seconds", "0"], "--seconds: must be a number of seconds above 0, got '0'"),
        (["run", "x", "--seconds", "-1"], "--seconds: must be a number of seconds above 0, got '-1'"),
        (["run", "x", "--seconds", "nan"], "--seconds: must be a number of seconds above 0"),
        (["run", "x", "--steps", "0"], "--steps: must be a whole number of 1 or more, got '0'"),
        (["run", "x", "--frames", "1.5"], "--frames: must be a whole number of 1 or more"),
        (["run", "x", "--seed", "-1"], "--seed: must be a whole number from 0"),
        (["run", "x", "-o", "nowhere/walk.mp4"], "no directory nowhere"),
        (["run", "x", "-o", "walk.txt"], "a recording is an .mp4 file"),
        (["run", "x", "-o", "/proc/walk.mp4"], "cannot record to /proc/walk.mp4"),
        (["demo", "-o", "nowhere/demo.mp4"], "no directory nowhere"),
        (["demo", "--seconds", "0"], "--seconds: must be"),
        (["bench", ""], "the prompt is empty"),
        (["play", ""], "the prompt is empty"),
        (["run"], "say what to draw, in words"),
        (["run", "x", "--image", "a.png"], "--image is for video models; this model is none of them"),
        (["run", "x", "--timeline", "a.json"], "--timeline is for video models"),
        (["run", "x", "--strength", "0"], "--strength is for video models"),
        (["run", "x", "--video", "a.mp4"], "--video is for video models"),
        (["run", "x", "--size", "16x32"], "--size is for video models"),
        (["run", "x", "--dtype", "float32"], "--dtype is for video models"),
        (["run", "x", "--decoder", "a.pth"], "--decoder is for video models"),
        (["run", "x", "--recipe", "longlive"], "--recipe is for video models"),
        (["info", "--recipe", "longlive"], "--recipe is about a video model; say which with --model"),
        (["dance"], "invalid choice: 'dance'"),
        ([], "required: COMMAND"),
        (["train", "everything"], "unknown recipe 'everything'; millstream train knows data, codec, world"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    world, words: list[str], message: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    try:
        code = cli.main(words)
    except SystemExit as stopped:  # argparse's own way out
        code = stopped.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("millstream")
    assert re.search(message, err), err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture) -> None:
    for model in ("nope", "./nope", "~/no/such/folder"):
        assert cli.main(["run", "x", "--model", model]) == 2
        assert f"no model {model!r}: give one of" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_a_device_that_is_not_there_is_told(device: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["run", "x", "--device", device]) == 2
    assert device in capsys.readouterr().err


def test_recipes_read_their_own_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "codec", "--help"])
    assert stopped.value.code == 0
    assert "--data" in capsys.readouterr().out


def test_train_alone_lists_the_recipes(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train"]) == 0
    out = capsys.readouterr().out
    assert all(recipe in out for recipe in ("data", "codec", "world"))


def test_debug_shows_the_traceback(world) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        cli.main(["run", "", "--debug"])


def test_a_defect_is_not_dressed_up_as_a_mistake(world, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(world, "advance", broken)
    with pytest.raises(RuntimeError, match="boom"):
        cli.main(["run", "x", "--frames", "3"])


def test_ctrl_c_leaves_a_playable_recording(
    world, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    advance = world.advance

    def interrupted(*arguments: object) -> object:
        if len(world.seen) == 10:
            raise KeyboardInterrupt
        return advance(*arguments)

    monkeypatch.setattr(world, "advance", interrupted)
    assert cli.main(["run", "a brick corridor"]) == 130
    assert len(colours(tmp_path / "walk.mp4")) == 10
    out, err = capsys.readouterr()
    assert "walk.mp4: 10 frames" in out
    assert err.endswith("millstream: interrupted\n")


def test_only_worlds_are_offered_as_worlds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from millstream.ui import world

    for name, kind in (("meadow", "WorldPipeline"), ("emoji", "ImagePipeline")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    monkeypatch.setattr(world, "ASSETS", tmp_path)
    assert list(world.shipped_models()) == ["meadow"]
    assert list(world.shipped_models(kind=None)) == ["emoji", "meadow"]
    with pytest.raises(FileNotFoundError, match="give one of meadow, or"):
        world.load_world("nowhere")
