"""Camera in, pictures out: what goes in comes back, newest first, with its own time."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest

from millstream.ui.server.pictures import decode, dimensions, encode
from millstream.ui.server.protocol import Refused


def picture(brightness: int = 128, size: tuple[int, int] = (48, 64), extension: str = ".jpg", options=()) -> bytes:
    return cv2.imencode(extension, np.full((*size, 3), brightness, np.uint8), options)[1].tobytes()


def test_a_picture_comes_back_with_its_capture_time(serve, client):
    visitor = client(serve())
    visitor.hello(mode="camera")
    visitor.ask("start")
    for brightness, captured in ((40, 1000.25), (200, 1033.5)):
        visitor.picture(picture(brightness), captured)
        shot = visitor.shot()
        assert shot.time == captured
        assert shot.rgb[2] == pytest.approx(brightness / 255, abs=0.03)


def test_a_slow_model_answers_the_newest_picture(serve, client, fake):
    running = serve(fake(delay=0.2))
    visitor = client(running)
    visitor.hello(mode="camera")
    visitor.ask("start")
    for index in range(30):
        visitor.picture(picture(), float(index))
        time.sleep(1 / 60)
    answered = [visitor.shot().time for _ in range(3)]
    assert answered == sorted(answered)
    assert answered[2] - answered[1] >= 8, "between two answers the camera took about twelve pictures"
    status = visitor.until("status")
    assert status["dropped"] >= 20


def test_pictures_wait_for_start(serve, client):
    running = serve()
    visitor = client(running)
    visitor.hello(mode="camera")
    visitor.picture(picture())
    visitor.ask("pause")
    time.sleep(0.1)
    assert running.pipe.batches == []
    visitor.ask("step")
    visitor.picture(picture())
    visitor.shot()
    visitor.picture(picture())
    time.sleep(0.1)
    assert running.pipe.batches == [1]


def test_strength_steers_a_pipeline_that_has_it(serve, client, fake_video):
    running = serve(fake_video())
    visitor = client(running)
    assert "strength" in visitor.hello(mode="camera")["controls"]
    visitor.ask("start")
    version = visitor.ask("steer", strength=0.25)["version"]
    visitor.picture(picture())
    assert visitor.shot().version == version
    assert running.pipe.read[-1][1].strength == 0.25
    assert "number from 0 to 1" in visitor.ask("steer", strength=2)["message"]
    assert "unknown control keys" in visitor.ask("steer", keys=[])["message"]


@pytest.mark.parametrize("extension", [".jpg", ".webp"])
def test_pictures_are_cut_around_the_middle(extension):
    wide = np.zeros((96, 400, 3), np.uint8)
    wide[:, 136:264] = (0, 0, 255)  # red, in OpenCV's order: the middle 4:3
    data = cv2.imencode(extension, wide)[1].tobytes()
    assert dimensions(data) == (96, 400)
    seen = decode(data, (24, 32))
    assert seen.shape == (3, 24, 32)
    assert 0 <= seen.min() <= seen.max() <= 1
    assert seen[0].mean() > 0.95
    assert seen[2].mean() < 0.05


@pytest.mark.parametrize(("size", "target"), [((1, 1), (96, 128)), ((31, 17), (24, 32)), ((2000, 2000), (24, 32))])
def test_any_honest_size_is_brought_to_the_pipeline_s(size, target):
    assert decode(picture(90, size), target).shape == (3, *target)


def header_says(height: int, width: int) -> bytes:
    """A JPEG whose frame header claims these dimensions."""
    data = bytearray(picture())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "JPEG or a WebP"),
        (b"GIF89a" + bytes(100), "JPEG or a WebP"),
        (picture(extension=".png"), "JPEG or a WebP"),
        (b"\xff\xd8\xff", "cut short"),
        (b"\xff\xd8" + bytes(50), "damaged"),
        (picture()[:30], "cut short"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "damaged|cut short"),
        (header_says(65535, 65535), "65535x65535"),
        (header_says(4096, 4096), "4096x4096"),
        (header_says(0, 64), "64x0"),
        (picture(options=(cv2.IMWRITE_JPEG_PROGRESSIVE, 1)), "progressive"),
        (b"RIFF\x22\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0\xff\xff\xff\xff\xff\xff", "animation"),
        (b"RIFF\x22\0\0\0WEBPVP8X\x0a\0\0\0\x00\0\0\0\xff\xff\xff\xff\xff\xff", "16777216x16777216"),
    ],
)
def test_pictures_that_are_none_are_refused_before_anything_decodes_them(monkeypatch, data, message):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(Refused, match=message):
        decode(data, (24, 32))


def test_a_picture_with_a_good_header_and_a_bad_body_is_refused():
    data = picture(extension=".webp")
    with pytest.raises(Refused, match="damaged"):
        decode(data[:40], (24, 32))


def test_a_visitor_who_sends_a_bad_picture_is_told_and_goes_on(serve, client):
    visitor = client(serve())
    visitor.hello(mode="camera")
    visitor.ask("start")
    visitor.picture(header_says(65535, 65535))
    assert "65535x65535" in visitor.until("refused")["message"]
    visitor.picture(picture(200))
    assert visitor.shot().rgb[2] > 0.7


def test_a_visitor_who_sends_only_bad_pictures_is_hung_up_on(serve, client):
    visitor = client(serve())
    visitor.hello(mode="camera")
    visitor.ask("start")
    for _ in range(50):
        visitor.picture(b"no picture at all")
        visitor.until("refused") if _ < 49 else None
    code, bye = visitor.farewell()
    assert code == 4400
    assert "JPEG or a WebP" in bye["message"]


def test_frames_are_sent_as_the_client_likes_them_and_the_size_allows():
    import torch

    small, large = torch.rand(3, 96, 128), torch.rand(3, 480, 640)
    assert encode(small, ("webp", "jpeg"), 80)[1][:2] == b"\xff\xd8", "JPEG is quicker by far"
    assert encode(small, ("webp", "jpeg"), 40)[1][8:12] == b"WEBP", "on a narrow way its fewer bytes count more"
    assert encode(small, ("jpeg", "webp"), 80)[1][:2] == b"\xff\xd8"
    assert encode(large, ("webp", "jpeg"), 40)[1][:2] == b"\xff\xd8", "WebP would take longer than a frame"
    assert encode(large[:, :200, :200], ("webp",), 80)[1][8:12] == b"WEBP"
    assert len(encode(large, ("jpeg",), 40)[1]) < len(encode(large, ("jpeg",), 80)[1])


def test_colours_arrive_in_order():
    import torch

    red = torch.zeros(3, 64, 64)
    red[0] = 1
    _, data = encode(red, ("jpeg",), 90)
    assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[32, 32].tolist() == pytest.approx(
        [0, 0, 255], abs=4
    )


@pytest.mark.parametrize("marker", [0x00, 0x01, 0xD0, 0xD7, 0xD8, 0xF0])
def test_a_jpeg_that_hides_its_true_size_from_us_is_refused(marker):
    """To a decoder `marker` has no length, to a careless reader it has one that leads to another, small frame."""
    small = cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    frame = small[small.index(b"\xff\xc0") :]
    bomb = picture(size=(2600, 2600))
    comment = bytearray(b"\xff\xe0\xff\xfd" + bytes(65531))
    comment[0xFFE0:] = frame[: len(comment) - 0xFFE0].ljust(len(comment) - 0xFFE0, b"\0")
    crafted = bomb[:2] + bytes((0xFF, marker)) + bytes(comment) + bomb[2:]
    with pytest.raises(Refused, match="damaged"):
        dimensions(crafted)
