import sys
import types

import pytest
import torch

from millstream.streaming import Chunk, EndOfStream, Steady, Tee, VirtualCamera


class Kept:
    def __init__(self, log=None, name="", error=None):
        self.chunks, self.closed = [], 0
        self.log, self.name, self.error = log, name, error

    def write(self, chunk):
        if self.log is not None:
            self.log.append(self.name)
        if self.error:
            raise self.error
        self.chunks.append(chunk)

    def close(self):
        self.closed += 1
        if self.error:
            raise self.error


def chunk(value, time, rate=10.0, frames=1):
    return Chunk("video", torch.full((frames, 3, 2, 4), value), 0, rate, 7, time)


def test_a_tee_writes_to_all_in_order_and_closes_all_even_after_an_error():
    log = []
    broken = Kept(log, "b", EndOfStream("the window was closed"))
    sinks = [Kept(log, "a"), broken, Kept(log, "c")]
    tee = Tee(*sinks)
    with pytest.raises(EndOfStream, match="the window was closed"):
        tee.write(chunk(0.1, 0.0))
    assert log == ["a", "b"]
    with pytest.raises(EndOfStream):
        tee.close()
    assert [sink.closed for sink in sinks] == [1, 1, 1]


def steadied(chunks, rate):
    kept = Kept()
    steady = Steady(kept, rate=rate)
    for each in chunks:
        steady.write(each)
    steady.close()
    assert kept.closed == 1
    assert [each.start for each in kept.chunks] == list(range(len(kept.chunks)))
    assert {each.rate for each in kept.chunks} <= {rate}
    return [round(float(each.data.mean()), 2) for each in kept.chunks]


def test_a_steady_stream_plays_at_the_speed_it_was_lived():
    assert steadied([chunk(n / 10, 50 + n / 10) for n in range(6)], 10) == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    slow = steadied([chunk(n / 10, 50 + n / 2) for n in range(4)], 10)
    assert slow == [0] * 5 + [0.1] * 5 + [0.2] * 5 + [0.3]
    fast = steadied([chunk(n / 100, 50 + n / 100) for n in range(100)], 10)
    assert len(fast) in (10, 11)
    assert fast[5] == pytest.approx(0.5, abs=0.06)
    jitter = [50, 50.02, 50.31, 50.33, 50.4, 51.0]
    assert len(steadied([chunk(0.5, time) for time in jitter], 10)) == 11
    assert len(steadied([chunk(0.5, 50, frames=20)], 5)) == 10, "a chunk of many frames has their times"


def test_a_long_break_is_cut_out():
    assert len(steadied([chunk(0.1, 50), chunk(0.2, 50.1), chunk(0.3, 90_000), chunk(0.4, 90_000.1)], 10)) == 4


@pytest.fixture
def driver(monkeypatch):
    opened = []

    class Device:
        device = "/dev/video7"

        def __init__(self, width, height, fps):
            if opened:
                raise RuntimeError("'v4l2loopback' backend: No v4l2 loopback device found.\n Did you ...?")
            self.size, self.fps, self.sent, self.closed = (width, height), fps, [], 0
            opened.append(self)

        def send(self, frame):
            assert frame.flags.c_contiguous
            self.sent.append(frame.copy())

        def close(self):
            self.closed += 1

    monkeypatch.setitem(sys.modules, "pyvirtualcam", types.SimpleNamespace(Camera=Device))
    return opened


def test_a_virtual_camera_shows_large_frames_in_their_colours(driver):
    camera = VirtualCamera(scale=3)
    picture = torch.zeros(2, 3, 2, 4)
    picture[:, 0, :, 0] = 1.0
    camera.write(Chunk("video", picture, 0, 17.5, 0, 0.0))
    camera.write(Chunk("audio", torch.zeros(1, 10), 0, 8000, 0, 0.0))
    (device,) = driver
    assert (device.size, device.fps, camera.device) == ((12, 6), 17.5, "/dev/video7")
    assert [frame.shape for frame in device.sent] == [(6, 12, 3)] * 2
    assert device.sent[0][5, 2].tolist() == [255, 0, 0]
    assert device.sent[0][5, 3].tolist() == [0, 0, 0]
    camera.close(), camera.close()
    assert device.closed == 1
    other = VirtualCamera()
    with pytest.raises(OSError, match=r"no virtual camera can be opened \('v4l2loopback' backend: No v4l2 .* Did you"):
        other.write(Chunk("video", picture, 0, 17.5, 0, 0.0))


def test_without_pyvirtualcam_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyvirtualcam", None)
    with pytest.raises(ImportError, match=r'pip install "millstream\[virtual-camera\]"'):
        VirtualCamera()
