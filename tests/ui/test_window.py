"""The window, on an OpenCV that keeps what it is shown and types what the test says."""

from __future__ import annotations

import sys
import time
from collections import deque

import cv2
import numpy as np
import pytest
import torch

from millstream.streaming import Chunk, EndOfStream
from millstream.ui import cli, window
from millstream.ui.window import Window, key_name


class FakeOpenCV:
    """Draws as OpenCV does; the screen and the keyboard are lists."""

    def __init__(self) -> None:
        self.typed: deque[int] = deque()
        self.shown: list[np.ndarray] = []
        self.visible = True
        self.on_wait = lambda: None

    def __getattr__(self, name: str) -> object:
        return getattr(cv2, name)

    def namedWindow(self, title: str, flags: int) -> None:
        pass

    def imshow(self, title: str, picture: np.ndarray) -> None:
        self.shown.append(picture)

    def waitKeyEx(self, milliseconds: int) -> int:
        self.on_wait()
        if self.typed:
            return self.typed.popleft()
        time.sleep(milliseconds / 1000)
        return -1

    def getWindowProperty(self, title: str, which: int) -> float:
        return float(self.visible)

    def destroyWindow(self, title: str) -> None:
        self.visible = False


@pytest.fixture
def opencv(monkeypatch: pytest.MonkeyPatch) -> FakeOpenCV:
    fake = FakeOpenCV()
    monkeypatch.setattr(window, "_opencv", lambda: fake)
    monkeypatch.setattr(window, "_require_screen", lambda: None)
    return fake


def chunk(frames: int = 1, rate: float = 1000.0) -> Chunk:
    data = torch.zeros(frames, 3, 12, 16)
    data[:, 0] = 1.0
    return Chunk("video", data, 0, rate, 0, time.monotonic())


def test_frames_are_shown_enlarged_in_their_colours(opencv: FakeOpenCV) -> None:
    Window().write(chunk(2))
    assert [picture.shape for picture in opencv.shown] == [(480, 640, 3)] * 2
    assert opencv.shown[0][-1, -1].tolist() == [0, 0, 255]  # OpenCV's order is blue, green, red
    Window(scale=2).write(chunk())
    assert opencv.shown[-1].shape == (24, 32, 3)


def test_the_overlay_is_drawn(opencv: FakeOpenCV) -> None:
    shown = Window()
    shown.write(chunk())
    shown.caption = "KeyW   a brick corridor"
    shown.write(chunk())
    without, with_caption = (picture[28:48] for picture in opencv.shown)
    assert (without == without[0, 0]).all()
    assert (with_caption != without).any()


def test_frames_keep_their_rate(opencv: FakeOpenCV) -> None:
    shown = Window()
    start = time.monotonic()
    shown.write(chunk(5, rate=50.0))
    assert 0.08 <= time.monotonic() - start < 0.5


def test_a_camera_faster_than_the_rate_does_not_wait(opencv: FakeOpenCV) -> None:
    shown, captured = Window(), time.monotonic()
    start = time.monotonic()
    for _ in range(5):
        shown.write(Chunk("video", torch.zeros(1, 3, 12, 16), 0, 2.0, 0, captured))
    assert time.monotonic() - start < 0.5


def test_keys_are_heard_and_held(opencv: FakeOpenCV) -> None:
    shown = Window(hold=0.2)
    opencv.typed.extend([ord("w"), 0xFF51, ord("w"), 0x100000 | ord("3")])
    shown.write(chunk())
    assert shown.keys >= {"KeyW", "ArrowLeft"}
    assert shown.presses() == ["KeyW", "ArrowLeft", "Digit3"]
    assert shown.presses() == []
    time.sleep(0.25)
    assert shown.keys == set()


@pytest.mark.parametrize("way", ["escape", "cross"])
def test_a_closed_window_ends_the_stream(opencv: FakeOpenCV, way: str) -> None:
    shown = Window()
    if way == "escape":
        opencv.typed.append(27)
    else:
        opencv.visible = False
    shown.write(chunk(100))
    assert shown.closed
    assert len(opencv.shown) == 1
    with pytest.raises(EndOfStream):
        shown.write(chunk())
    shown.close()
    shown.close()


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (-1, None),
        (ord("w"), "KeyW"),
        (ord("W"), "KeyW"),
        (ord("7"), "Digit7"),
        (32, "Space"),
        (27, "Escape"),
        (0xFF53, "ArrowRight"),
        (0x270000, "ArrowRight"),
        (0xF703, "ArrowRight"),
        (0xFFE1, None),
    ],
)
def test_key_names(code: int, name: str | None) -> None:
    assert key_name(code) == name


@pytest.mark.parametrize(("options", "message"), [({"scale": 0}, "scale must be 1"), ({"hold": 0}, "hold must be")])
def test_bad_options_are_refused(opencv: FakeOpenCV, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Window(**options)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems always have a screen")
def test_a_machine_without_a_screen_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert cli.main(["play"]) == 2
    assert "no screen to open a window on" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems always have a screen")
def test_a_screen_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":987")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(OSError, match="no window can be opened on screen :987"):
        Window()


def test_opencv_that_cannot_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="pip install opencv-python"):
        Window()


def test_play(world, opencv: FakeOpenCV, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A short game: walk, go to another world, record, begin anew, quit."""
    monkeypatch.chdir(tmp_path)
    script = {3: "w", 6: "2", 8: "o", 14: "r", 20: "\x1b"}
    typed: set[int] = set()

    def type_when_due() -> None:
        frame = len(opencv.shown)
        if frame in script and frame not in typed:
            typed.add(frame)
            opencv.typed.append(ord(script[frame]))

    opencv.on_wait = type_when_due
    assert cli.main(["play", "a brick corridor"]) == 0
    said = capsys.readouterr().out
    assert all(words in said for words in ("KeyW", "MOVE_FORWARD", "a slime arena", "Esc", "begin anew"))
    assert {"KeyW"} in [set(control.keys) for control in world.seen]
    assert {control.prompt for control in world.seen[10:]} == {"a slime arena"}
    (recording,) = tmp_path.glob("millstream-*.mp4")
    assert recording.stat().st_size > 1000
    assert f"{recording.name}: " in said
