"""What the page calls in Python: clips from bounded uploads, memory plans, settings. No browser."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from millstream.streaming import Chunk, Recorder, VideoFile
from millstream.ui.page import PageSettings, build_page, mount_page
from millstream.ui.page import uploads as uploads_module
from millstream.ui.page.build import _server_functions
from millstream.ui.page.clips import ClipRequest, make_clip, remove_old
from millstream.ui.page.memory import memory_plan
from millstream.ui.page.uploads import read_pictures

SIZE = (48, 64)


def save_image(path: Path, size: tuple[int, int] = (90, 160)) -> Path:
    """Left third red, middle green, right third blue."""
    pixels = np.zeros((*size, 3), np.uint8)
    third = size[1] // 3
    for channel in range(3):
        pixels[:, channel * third : (channel + 1) * third, channel] = 255
    Image.fromarray(pixels).save(path)
    return path


def save_video(path: Path, frames: int, rate: float = 10) -> Path:
    """Frame n has the brightness n / frames."""
    with Recorder(path, rate=rate) as recorder:
        for number in range(frames):
            data = torch.full((1, 3, 48, 64), number / frames)
            recorder.write(Chunk("video", data, number, rate, 0, 0.0))
    return path


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "misnamed.mp4.png"])
def test_an_image_is_cut_around_its_middle(tmp_path: Path, name: str) -> None:
    (picture,) = read_pictures(save_image(tmp_path / name), size=SIZE, rate=25, most=8)
    assert picture.shape == (3, *SIZE)
    assert 0 <= picture.min() <= picture.max() <= 1
    assert picture[:, 24, 32].argmax() == 1
    assert picture[:, 24, 2].argmax() == 0
    # 160 x 90 cut to 4 : 3 loses 20 pixels at each side, so red fills (53 - 20) / 120 of the width
    assert (picture[0] > 0.5).float().mean() == pytest.approx(33 / 120, abs=0.03)


def test_a_video_is_read_at_the_rate_asked_for_and_only_its_end_is_kept(tmp_path: Path) -> None:
    video = save_video(tmp_path / "v.mp4", frames=40, rate=20)
    pictures = read_pictures(video, size=SIZE, rate=10, most=100)
    assert len(pictures) == 20
    assert pictures[10].mean() == pytest.approx(20 / 40, abs=0.03)
    last = read_pictures(video, size=SIZE, rate=10, most=3)
    assert len(last) == 3
    assert last[-1].mean() == pytest.approx(38 / 40, abs=0.03)


def test_too_much_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = tmp_path / "huge.png"
    Image.new("1", (5000, 100)).save(huge)
    with pytest.raises(ValueError, match="5000 x 100 pixels; at most 4096"):
        read_pictures(huge, size=SIZE, rate=25, most=8)
    monkeypatch.setattr(uploads_module, "MAX_SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"longer than 0\.5 seconds"):
        read_pictures(save_video(tmp_path / "long.mp4", frames=20), size=SIZE, rate=10, most=8)
    monkeypatch.setattr(uploads_module, "MAX_BYTES", 1 << 20)
    heavy = tmp_path / "heavy.png"
    heavy.write_bytes(bytes(3 << 20))
    with pytest.raises(ValueError, match="the file has 3 MB; at most 1 MB"):
        read_pictures(heavy, size=SIZE, rate=25, most=8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "no image .* and no video"),
        (b"", "no image .* and no video"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "the image is damaged"),
        (struct.pack(">I", 24) + b"ftypisom" + bytes(100), "can't be read"),
    ],
)
def test_what_is_neither_image_nor_video_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "upload.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_pictures(path, size=SIZE, rate=25, most=8)


def test_a_clip_follows_its_key_script_under_a_progress(world: Any, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    request = ClipRequest("a dark maze with red walls", num_frames=6, keys="KeyW*3 -*3")
    frames, seconds = make_clip(world, request, tmp_path / "c.mp4", most=10, progress=lambda *at: told.append(at))
    assert (frames, told[-1], len(told)) == (6, (6, 6), 6)
    assert seconds > 0
    green = [frame[1, -20:].mean() > 0.5 for frame in VideoFile(tmp_path / "c.mp4")]
    assert green == [True, True, True, False, False, False]


def test_a_clip_goes_on_from_an_upload(world: Any, tmp_path: Path) -> None:
    request = ClipRequest("a dark maze with red walls", num_frames=2, upload=save_image(tmp_path / "a.png"))
    frames, _ = make_clip(world, request, tmp_path / "c.mp4", most=10, progress=lambda *at: None)
    assert frames == 3
    first = next(iter(VideoFile(tmp_path / "c.mp4")))
    assert (
        first[:, :20, first.shape[2] // 2].mean((1,)).argmin() == 1
    )  # the fake world draws what it sees as a negative


def test_a_redrawn_video_keeps_its_length_and_its_strength(world: Any, tmp_path: Path) -> None:
    video = save_video(tmp_path / "v.mp4", frames=20, rate=25)
    request = ClipRequest("a maze", num_frames=0, upload=video, strength=0.5)
    assert make_clip(world, request, tmp_path / "c.mp4", most=30, progress=lambda *at: None)[0] == 20
    assert world.controls[-1].strength == 0.5
    shown = ClipRequest("a maze", num_frames=0, upload=video)
    assert make_clip(world, shown, tmp_path / "d.mp4", most=30, progress=lambda *at: None)[0] == world.window.frames


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 0}, "frames must be from 1 to 10, got 0"),
        ({"num_frames": 11}, "frames must be from 1 to 10, got 11"),
        ({"seed": -1}, "seed must be from 0"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"keys": "KeyQ"}, "unknown key 'KeyQ'"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a number from 0"),
    ],
)
def test_a_clip_out_of_range_is_refused(world: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    request = ClipRequest(**{"prompt": "a maze", "num_frames": 2, **changes})
    with pytest.raises(ValueError, match=message):
        make_clip(world, request, tmp_path / "c.mp4", most=10, progress=lambda *at: None)
    assert not (tmp_path / "c.mp4").exists()


def test_old_clips_go(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.mp4").write_bytes(b"")
    remove_old(tmp_path, keep=2)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_plan_is_what_the_model_takes() -> None:
    from millstream import WorldPipeline

    plan = memory_plan("freedoom")
    pipe: Any = WorldPipeline.from_pretrained("freedoom")
    for part, planned in plan.weights.items():
        held = sum(weight.nbytes for weight in getattr(pipe, part).state_dict().values())
        assert planned == pytest.approx(held, rel=0.02), part
    cache = pipe.arena.cache
    assert plan.cache == pytest.approx(cache.k.nbytes + cache.v.nbytes, rel=0.1)
    assert plan.free > 0


def test_a_model_that_is_not_there_has_no_size() -> None:
    plan = memory_plan("nobody/nothing")
    assert plan.total == 0
    assert "Not downloaded yet" in plan.note


def test_only_what_was_offered_is_looked_at_or_loaded() -> None:
    loaded: list[tuple[str, str, str]] = []
    settings = PageSettings(presets=("fast",), load=lambda *choice: loaded.append(choice))
    models, plan, load = _server_functions(settings)
    assert models(None)["models"] == ["freedoom"]
    assert plan(["freedoom", "", "fast"])["command"] == "millstream serve --model freedoom --preset fast"
    for choice in (["/etc", "", ""], ["freedoom", "", "slow"], ["freedoom"], "freedoom", [["freedoom"], "", ""]):
        with pytest.raises(ValueError, match=r"offers no such|a choice is a list"):
            load(choice)
    assert loaded == []
    assert load(["freedoom", "", "fast"]) == {"model": "freedoom"}
    assert loaded == [("freedoom", "", "fast")]
    assert models(None)["preset"] == "fast"


def test_a_load_that_fails_is_told_in_its_own_words() -> None:
    def load(*choice: str) -> None:
        raise ValueError("the weights are damaged")

    _, _, call = _server_functions(PageSettings(load=load))
    assert call(["freedoom", "", ""]) == {"error": "the weights are damaged"}


@pytest.mark.parametrize(
    ("changes", "message"), [({"model": ""}, "model is empty"), ({"clip_seconds": 0}, "more than 0")]
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PageSettings(**changes)
    assert PageSettings(model="mine").models == ("mine", "freedoom")


def test_the_page_stands_without_a_pipeline() -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    assert build_page(PageSettings())
    client = TestClient(mount_page(FastAPI(), PageSettings()))
    assert "page/main.js" in client.get("/").text
    script = client.get("/page/main.js")
    assert script.status_code == 200
    assert "javascript" in script.headers["content-type"]
    assert client.get("/page/../build.py").status_code == 404


def test_gradio_looks_for_clips_now_and_then_and_not_a_thousand_times_a_second() -> None:
    queue = build_page(PageSettings(model="x"))._queue
    assert queue.sleep_when_free >= 0.05
    assert queue.progress_update_sleep_when_free >= 0.05


class Lies:
    """A video whose header says what it likes, for ever."""

    def __init__(self, rate: float, shapes: list[tuple[int, int]]) -> None:
        self.rate, self.shapes, self.grabbed = rate, shapes, 0

    def isOpened(self) -> bool:
        return True

    def get(self, what: int) -> float:
        import cv2

        return self.rate if what == cv2.CAP_PROP_FPS else 16.0

    def grab(self) -> bool:
        self.grabbed += 1
        assert self.grabbed < 20_000, "it is read for ever"
        return True

    def retrieve(self) -> tuple[bool, np.ndarray]:
        height, width = self.shapes[min(self.grabbed, len(self.shapes)) - 1]
        return True, np.zeros((height, width, 3), np.uint8)

    def release(self) -> None: ...


@pytest.mark.parametrize(
    ("rate", "shapes", "message"),
    [
        (-1.0, [(16, 16)], "longer than 60 seconds"),
        (float("nan"), [(16, 16)], "longer than 60 seconds"),
        (1e9, [(16, 16)], "longer than 60 seconds"),
        (240.0, [(2160, 3840)], "more pixels than a minute of full HD"),
        (25.0, [(16, 16), (16, 16), (64, 64)], "changes its size"),
        (25.0, [(16, 8192)], "at most 4096"),
    ],
)
def test_a_video_is_measured_by_what_is_read_of_it(tmp_path, monkeypatch, rate, shapes, message) -> None:
    video = tmp_path / "lies.mp4"
    video.write_bytes(b"\0\0\0\x18ftypisom")
    lies = Lies(rate, shapes)
    monkeypatch.setattr("cv2.VideoCapture", lambda path: lies)
    with pytest.raises(ValueError, match=message):
        read_pictures(video, size=SIZE, rate=1, most=2)


def test_a_jpeg_of_thousands_of_scans_is_not_decoded(tmp_path: Path) -> None:
    plain = tmp_path / "plain.jpg"
    Image.new("RGB", (64, 48)).save(plain, progressive=True)
    assert len(read_pictures(plain, size=SIZE, rate=25, most=1)) == 1
    data = plain.read_bytes()
    bomb = tmp_path / "bomb.jpg"
    scan = data[data.rindex(b"\xff\xda") : -2]
    bomb.write_bytes(data[:-2] + scan * 1000 + data[-2:])
    with pytest.raises(ValueError, match="more than 64 scans"):
        read_pictures(bomb, size=SIZE, rate=25, most=1)
