"""`millstream live` as a user meets it: a video in, a file or a window out, steered while it runs."""

from __future__ import annotations

import io
import json
import re
import time
from collections import deque
from itertools import groupby
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
import pytest
import torch

from millstream.streaming import Chunk, ImageControl, Recorder, Session
from millstream.ui import cli, window
from millstream.ui.live import at_rate, hear
from millstream.ui.page.memory import memory_plan
from millstream.ui.world import load_world, shipped_models, world_dtype


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Two seconds at 25 frames per second, wider than any world, ever brighter in red; a green rim is to be cut off."""
    data = torch.zeros(50, 3, 48, 96)
    data[:, 0] = torch.linspace(0.2, 0.9, 50)[:, None, None]
    data[:, :, :, :12], data[:, :, :, -12:] = 0, 0
    data[:, 1, :, :12], data[:, 1, :, -12:] = 1, 1
    path = tmp_path / "in.mp4"
    with Recorder(path, rate=25) as recorder:
        recorder.write(Chunk("video", data, 0, 25, 0, 0.0))
    return path


def colours(path: Path) -> np.ndarray:
    return iio.imread(path, plugin="FFMPEG").mean(axis=(1, 2)) / 255


def test_a_video_becomes_a_file_without_a_screen_and_without_a_frame_lost(world, video, monkeypatch, capsys) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    words = ["live", "--video", str(video), "-o", "out.mp4", "--prompt", "a slime arena", "--seed", "5", "--strength"]
    assert cli.main([*words, "0.3", "--stream-batch", "--skip-similar", "0.98", "--follow-motion", "0.2"]) == 0
    seen = colours(Path("out.mp4"))
    assert len(seen) == 35  # two seconds of the world's 17.5 frames per second
    assert (np.diff(seen[:, 0]) > -0.01).all()
    assert (seen[0, 0], seen[-1, 0]) == (pytest.approx(0.2, abs=0.05), pytest.approx(0.9, abs=0.05))
    assert seen[:, 1].max() < 0.1, "the rim is cut off"
    assert {tuple(frame.data.shape) for frame in world.shown} == {(3, 12, 16)}
    assert world.asked == {
        "prompt": "a slime arena",
        "seed": 5,
        "steps": None,
        "strength": 0.3,
        "stream_batch": True,
        "skip_similar": 0.98,
        "follow_motion": 0.2,
    }
    assert "out.mp4: 35 frames (2.0 s at 17.5 frames/s), drawn at" in capsys.readouterr().out


def test_seconds_end_a_file_and_a_loop(world, video) -> None:
    assert cli.main(["live", "--video", str(video), "-o", "out.mp4", "--seconds", "1"]) == 0
    assert len(colours(Path("out.mp4"))) == 18
    assert cli.main(["live", "--video", str(video), "--loop", "-o", "long.mp4", "--seconds", "4"]) == 0
    red = colours(Path("long.mp4"))[:, 0]
    assert len(red) == 70
    assert np.abs(red[:35] - red[35:]).max() < 0.05


def test_pictures_at_another_rate() -> None:
    assert list(at_rate(range(10), 10.0, 5.0)) == [0, 2, 4, 6, 8]
    assert list(at_rate(range(3), 5.0, 10.0)) == [0, 1, 1, 2, 2]
    assert list(at_rate(range(4), 17.5, 17.5)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--camera", "97"], "camera 97 cannot be opened: is it plugged in"),
        (["--camera", "front"], "--camera: must be the number of a camera, 0 for the first, got 'front'"),
        (["--video", "nowhere.mp4"], "there is no video file nowhere.mp4"),
        (["--video", "."], "there is no video file"),
        (["--video", "empty.mp4", "-o", "out.mp4"], "empty.mp4 is not a video that OpenCV can read"),
        (["--video", "text.mp4", "-o", "out.mp4"], "text.mp4 is not a video that OpenCV can read"),
        (["--video", "in.mp4", "--camera", "0"], "not allowed with argument"),
        (["--url", "ftp://host/x"], "must begin with rtsp://, http:// or https://, got ftp://"),
        (["--url", "in.mp4"], "got none; a file is given with --video"),
        (["--url", "http://127.0.0.1:9/x"], "no video came from http://127.0.0.1:9/x: is the address right"),
        (["--video", "in.mp4", "--strength", "1.5"], "--strength: must be a number from 0 to 1, got '1.5'"),
        (["--video", "in.mp4", "--strength", "nan"], "--strength: must be a number from 0 to 1"),
        (["--video", "in.mp4", "--skip-similar", "-1"], "--skip-similar: must be a number from 0 to 1"),
        (["--video", "in.mp4", "--follow-motion", "1"], "follow_motion must be a number from 0 to 0.9, got 1.0"),
        (["--video", "in.mp4", "--seconds", "0"], "--seconds: must be a number of seconds above 0"),
        (["--video", "in.mp4", "--prompt", " "], "the prompt is empty"),
        (["--video", "in.mp4", "-o", "nowhere/out.mp4"], "no directory nowhere"),
        (["--video", "in.mp4", "-o", "out.avi"], "a recording is an .mp4 file"),
        (["--video", "in.mp4"], "no screen to open a window on.*write a file instead.*-o OUT.mp4"),
        (["--loop"], "--loop needs --video"),
        (["--video", "in.mp4", "--loop", "-o", "out.mp4"], "would never end; say how long with --seconds"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_exit_code_2(world, video, words, message, monkeypatch, capfd) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    Path("empty.mp4").touch()
    Path("text.mp4").write_text("not a film")
    before = set(Path().iterdir())
    try:
        code = cli.main(["live", *words])
    except SystemExit as stopped:  # argparse's own way out
        code = stopped.code
    out, err = capfd.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("millstream")
    assert re.search(message, err), err
    assert set(Path().iterdir()) == before


def test_a_virtual_camera_without_its_package_names_the_extra(world, video, monkeypatch, capsys) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyvirtualcam", None)
    assert cli.main(["live", "--video", str(video), "--virtual-camera"]) == 2
    assert 'pip install "millstream[virtual-camera]"' in capsys.readouterr().err


class Screen:
    """OpenCV whose window keeps the pictures, and whose keyboard types `keys` at the frame they stand at."""

    def __init__(self, keys: dict[int, int]) -> None:
        self.keys, self.typed, self.shown = keys, deque(), []

    def __getattr__(self, name: str) -> object:
        return getattr(cv2, name)

    def namedWindow(self, title: str, flags: int) -> None: ...

    def destroyWindow(self, title: str) -> None: ...

    def imshow(self, title: str, picture: np.ndarray) -> None:
        self.shown.append(picture)

    def getWindowProperty(self, title: str, which: int) -> float:
        return 1.0

    def waitKeyEx(self, milliseconds: int) -> int:
        time.sleep(milliseconds / 1000)
        return self.keys.pop(len(self.shown), -1)


def test_a_window_shows_it_records_it_and_steers_it(world, video, monkeypatch, capsys) -> None:
    """At the world's pace: another world, more strength twice, less once, then away."""
    screen = Screen({4: ord("2"), 8: 0xFF52, 16: 0xFF52, 24: 0xFF54, 30: 27})
    monkeypatch.setattr(window, "_opencv", lambda: screen)
    monkeypatch.setattr(window, "_require_screen", lambda: None)
    words = ["live", "--video", str(video), "--loop", "--window", "-o", "out.mp4", "--seconds", "20"]
    assert cli.main([*words, "--prompt", "a brick corridor", "--strength", "0.5"]) == 0
    asked = [asked for asked, _ in groupby((control.prompt, control.strength) for control in world.seen)]
    assert asked == [
        ("a brick corridor", 0.5),
        ("a slime arena", 0.5),
        ("a slime arena", 0.55),
        ("a slime arena", 0.6),
        ("a slime arena", 0.55),
    ]
    assert len(screen.shown) == 30
    seconds = len(colours(Path("out.mp4"))) / 17.5
    frames = world.shown[: len(screen.shown)]
    assert seconds == pytest.approx(frames[-1].time - frames[0].time, abs=0.3), "it plays as fast as it was seen"
    out = capsys.readouterr().out
    assert int(re.search(r"(\d+) ms old", out)[1]) < 120
    assert "out.mp4: " in out


def test_lines_from_a_terminal_steer(world, capsys) -> None:
    session = world.stream("a brick corridor", strength=0.5)
    hear(io.StringIO("\na slime arena\n0.7\n7\n" + "x" * 3000 + "\n0.2\n"), session)
    assert (session.control.prompt, session.control.strength) == ("a slime arena", 0.2)
    err = capsys.readouterr().err
    assert "strength must be between 0" in err
    assert "prompt has 3,000 characters" in err


def test_ctrl_c_leaves_a_playable_file(world, video, monkeypatch, capsys) -> None:
    advance = world.advance

    def interrupted(*arguments: object) -> object:
        if len(world.seen) == 10:
            raise KeyboardInterrupt
        return advance(*arguments)

    monkeypatch.setattr(world, "advance", interrupted)
    assert cli.main(["live", "--video", str(video), "-o", "out.mp4"]) == 130
    assert len(colours(Path("out.mp4"))) == 10


@pytest.mark.skipif(not shipped_models(), reason="this checkout has no model in assets/")
def test_presets_of_a_world(capfd) -> None:
    exact, small = load_world("freedoom", "cpu"), load_world("freedoom", "cpu", "small")
    assert (exact.transformer.dtype, small.transformer.dtype) == (torch.float32, torch.bfloat16)
    assert load_world("freedoom", "cpu", "fast").transformer.dtype == torch.float32, "quicker on a GPU only"
    assert world_dtype("fast", "cuda") == torch.bfloat16
    drawn = []
    for pipe in (exact, small):
        with pipe.stream(pipe.worlds[0], generator=torch.Generator().manual_seed(0)) as session:
            drawn.append(session.step()[0].data)
        assert pipe.arena.dtype == pipe.transformer.dtype
    assert 0 < (drawn[0] - drawn[1]).abs().mean() < 0.02
    assert memory_plan("freedoom", preset="small").total == memory_plan("freedoom").total // 2
    assert "kept in float32" not in capfd.readouterr().err


def test_an_image_pipeline_redraws_a_video(video, monkeypatch, capsys) -> None:
    """Told from a world by what its folder says; with a prompt, which it needs."""
    from millstream.ui import live_image

    asked = {}

    class Redraws:
        rate, size = 30.0, (16, 24)

        def check(self, control) -> None: ...

        def begin(self, control, *, generator=None):
            return [0]

        def advance(self, states, controls, media):
            asked.update(control=controls[0], shape=tuple(media[0].data.shape))
            states[0][0] += 1
            return [[Chunk("video", 1 - media[0].data[None], states[0][0] - 1, self.rate, 0, media[0].time)]]

        def flush(self, state):
            return []

        def end(self, state) -> None: ...

        def stream(self, prompt, *, generator, **settings):
            return Session(self, ImageControl(prompt, **settings), generator=generator)

    folder = Path("turbo")
    folder.mkdir()
    parts = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["x", "y"]}
    (folder / "model_index.json").write_text(json.dumps(parts))
    assert live_image.is_image_model("turbo")
    monkeypatch.setattr("millstream.ui.commands.live.load_live_image", lambda arguments, control: Redraws())
    words = ["live", "--model", "turbo", "--video", str(video), "-o", "out.mp4"]
    assert cli.main(words) == 2
    assert "say what to draw with --prompt" in capsys.readouterr().err
    assert cli.main([*words, "--prompt", "a fox", "--follow-motion", "0.5"]) == 2
    assert "--follow-motion is for worlds" in capsys.readouterr().err
    assert cli.main([*words, "--prompt", "a fox", "--steps", "2", "--guidance", "self", "--guidance-scale", "1.4"]) == 0
    control = ImageControl("a fox", strength=0.5, num_inference_steps=2, guidance="self", guidance_scale=1.4)
    assert (asked["control"], asked["shape"]) == (control, (3, 16, 24))
    assert len(colours(Path("out.mp4"))) == 59  # two seconds of 25 per second, at 30
