import time

import pytest
import torch

from millstream.streaming import Camera, Chunk, EndOfStream, Recorder, VideoFile


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Ten frames at 25 per second, each one step brighter, red on the left and blue on the right."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    data = torch.zeros(10, 3, 32, 64)
    data[:, 0, :, :32] = torch.linspace(0.3, 0.9, 10)[:, None, None]
    data[:, 2, :, 32:] = 0.8
    with Recorder(path, rate=25) as recorder:
        recorder.write(Chunk("video", data, 0, 25, 0, 0.0))
    return path


def test_every_frame_of_a_file_in_rgb(clip):
    video = VideoFile(clip)
    frames = torch.stack(list(video))
    assert frames.shape == (10, 3, 32, 64)
    assert video.rate == pytest.approx(25)
    assert frames.dtype == torch.float32
    assert 0 <= frames.min() <= frames.max() <= 1
    left, right = frames[:, :, 8:24, 8:24].mean((2, 3)), frames[:, :, 8:24, 40:56].mean((2, 3))
    assert torch.allclose(left[:, 0], torch.linspace(0.3, 0.9, 10), atol=0.05)
    assert right[:, 2].sub(0.8).abs().max() < 0.06
    assert left[:, 2].max() < 0.1 > right[:, 0].max()
    video.close()


def play(video, seconds_per_frame=0.0):
    """Every frame with the time it was read at, and how often the reader was told to wait."""
    frames, waits = [], 0
    while True:
        try:
            frame = video.read()
        except EndOfStream:
            video.close()
            return frames, waits
        if frame is None:
            waits += 1
            time.sleep(0.002)
        else:
            frames.append((frame, time.monotonic()))
            time.sleep(seconds_per_frame)


def test_a_file_plays_at_its_own_rate(clip):
    start = time.monotonic()
    frames, waits = play(VideoFile(clip))
    assert (len(frames), waits > 20) == (10, True)
    assert 0.36 <= time.monotonic() - start < 0.8
    times = [frame.time for frame, _ in frames]
    assert times == sorted(times)
    assert start <= times[0] <= times[-1] <= time.monotonic()


def test_a_slow_reader_gets_every_frame_fresh(clip):
    frames, _ = play(VideoFile(clip), seconds_per_frame=0.08)
    assert len(frames) == 10
    assert max(read - frame.time for frame, read in frames) < 0.05


def test_files_that_are_no_video(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no video file"):
        VideoFile(tmp_path / "missing.mp4")
    for content in (b"", b"just a text"):
        path = tmp_path / "text.mp4"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a video that OpenCV can read"):
            VideoFile(path)


def test_a_camera_that_is_not_there_takes_one_sentence(capfd):
    with pytest.raises(OSError, match="camera 97 cannot be opened: is it plugged in"):
        Camera(97)
    assert capfd.readouterr().err == ""


def test_a_camera_that_falls_silent_is_reported(monkeypatch):
    """A stand-in for the device, since build machines have none."""
    import cv2
    import numpy as np

    class Device:
        def __init__(self, index):
            self.left = [np.full((4, 6, 3), (255, 0, 0), np.uint8)]  # OpenCV's order: this is blue

        def isOpened(self):
            return True

        def set(self, *_):
            pass

        def read(self):
            return (True, self.left.pop()) if self.left else (False, None)

        def release(self):
            self.left.clear()

    monkeypatch.setattr(cv2, "VideoCapture", Device)
    monkeypatch.setattr("millstream.streaming.sources.SILENCE_SECONDS", 0.05)
    camera = Camera()
    frame = camera.read()
    assert frame.data[:, 0, 0].tolist() == [0, 0, 1]
    assert abs(frame.time - time.monotonic()) < 1
    assert camera.read() is None
    time.sleep(0.06)
    with pytest.raises(OSError, match="camera 0 gives no frames any more"):
        camera.read()
    camera.close()


def test_a_file_in_a_loop_goes_on_for_ever(clip):
    video = VideoFile(clip, loop=True)
    red = [float(frame[0, 8:24, 8:24].mean()) for _, frame in zip(range(25), video)]
    assert red[:10] == red[10:20]
    assert red[20:] == red[:5]
    frames = []
    while len(frames) < 14:
        frame = video.read()
        frames += [frame.time] if frame else []
        time.sleep(0.002)
    assert frames == sorted(frames)
    assert frames[-1] - frames[0] > 0.95 * 13 / 25, "at its own rate, also across the seam"
    video.close()


def test_live_fits_the_pictures_of_any_camera_to_the_pipeline(clip, toy, seeded):
    from millstream.streaming import Session, WorldControl, live

    seen = []

    class Sized(toy):
        size = (24, 32)

        def advance(self, states, controls, media):
            seen.extend(tuple(frame.data.shape) for frame in media)
            return super().advance(states, controls, media)

    class Nothing:
        def write(self, chunk): ...
        def close(self): ...

    live(VideoFile(clip), Session(Sized(), WorldControl("x"), generator=seeded()), Nothing())
    assert set(seen) == {(3, 24, 32)}
