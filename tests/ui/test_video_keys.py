"""`millstream run` with a video model that is played: a key script becomes a walk."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

from millstream.streaming import VideoFile
from millstream.ui import cli
from millstream.ui.keys import KeyScript
from millstream.ui.video_keys import Walk

VIDEO = Path(__file__).resolve().parent.parent / "pipelines" / "video"


def module(name):
    spec = importlib.util.spec_from_file_location(name, VIDEO / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("game")
    module("test_game").make_game(module("conftest").make_parts).save_pretrained(folder)
    Image.new("RGB", (64, 32), "red").save(folder / "start.png")
    return folder


def run(folder, *words):
    return cli.main(["run", "--model", str(folder), "--device", "cpu", *map(str, words)])


def walk(folder, out, *words):
    assert run(folder, "--image", folder / "start.png", "-o", out, *words) == 0
    return torch.stack(list(VideoFile(out)))


def test_a_key_script_is_walked(folder, tmp_path, capsys):
    turning, straight, usual = (
        walk(folder, tmp_path / f"{name}.mp4", "--frames", 33, *words)
        for name, words in (
            ("turning", ("--keys", "KeyW*21 KeyW+ArrowLeft*99")),
            ("straight", ("--keys", "KeyW")),
            ("usual", ()),
        )
    )
    assert "usual.mp4: 33 frames" in capsys.readouterr().out
    assert len(turning) == 33
    assert torch.equal(straight, usual), "where no keys are said, it is KeyW"
    change = (turning - straight).abs().amax((1, 2, 3))
    assert change[:21].max() < change[21:].max() / 4, "the first two chunks hear the same"


def test_a_chunk_hears_every_key_of_its_pictures():
    heard = []

    class Listener:
        def steer(self, keys):
            heard.append(keys)

    keys = KeyScript.parse("KeyW*10 KeyA*1 -*14", {"KeyW", "KeyA"})
    follow = Walk(keys, 16.0, 9, 12).follow(Listener())
    for begun in (0, 9, 21, 33):
        follow(begun / 16.0)
    assert heard == [{"KeyW"}, {"KeyW", "KeyA"}, {"KeyW"}, {"KeyW", "KeyA"}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a corgi", "--image"], "this model is played and reads no words; leave the prompt out, and say --keys"),
        ([], "a world of this model begins with a picture; give one with --image"),
        (["--keys", "KeyQ", "--image"], "unknown key 'KeyQ'"),
        (["--strength", "0.5", "--image"], "--strength is for video models; this model is none of them"),
        (["--steps", "3", "--image"], "--steps is for worlds; this model is none of them"),
    ],
)
def test_what_a_played_model_does_not_read_is_refused(folder, tmp_path, capsys, words, message):
    start = [folder / "start.png"] if words else []
    assert run(folder, "-o", tmp_path / "out.mp4", *words, *start) == 2
    told = capsys.readouterr().err
    assert message in told
    assert not (tmp_path / "out.mp4").exists()
