import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from millstream.streaming import Chunk, Recorder, VideoFile


def chunk(data, start=0):
    return Chunk("video", data, start, 10.0, 0, 0.0)


def decoded(path):
    video = VideoFile(path)
    frames = torch.stack(list(video))
    video.close()
    return frames


def test_what_was_written_can_be_watched(tmp_path):
    path = tmp_path / "walk.mp4"
    brightness = torch.linspace(0.1, 0.9, 12)
    with Recorder(path, rate=17.5) as recorder:
        for n in range(0, 12, 3):
            recorder.write(chunk(brightness[n : n + 3, None, None, None].expand(3, 3, 32, 48), n))
    frames = decoded(path)
    assert recorder.frames == 12
    assert frames.shape == (12, 3, 32, 48)
    assert (frames.mean((1, 2, 3)) - brightness).abs().max() < 0.03
    assert VideoFile(path).rate == pytest.approx(17.5)


def test_small_worlds_stay_crisp(tmp_path):
    board = ((torch.arange(12)[:, None] + torch.arange(16)) % 2).float().expand(4, 3, 12, 16)
    with Recorder(tmp_path / "board.mp4", rate=10, scale=4) as recorder:
        recorder.write(chunk(board))
    frames = decoded(recorder.path)
    assert frames.shape == (4, 3, 48, 64)
    assert ((frames > 0.5).float() == board.repeat_interleave(4, 2).repeat_interleave(4, 3)).float().mean() > 0.999
    assert ((frames < 0.15) | (frames > 0.85)).float().mean() > 0.9, "no grey between the squares"


@pytest.mark.parametrize(
    ("size", "scale", "wanted"), [((7, 9), 1, (8, 10)), ((7, 9), 3, (24, 30)), ((7, 9), 2, (14, 18))]
)
def test_odd_sizes_repeat_their_edge(size, scale, wanted, tmp_path):
    with Recorder(tmp_path / "odd.mp4", rate=10, scale=scale) as recorder:
        recorder.write(chunk(torch.full((3, 3, *size), 0.7)))
    frames = decoded(recorder.path)
    assert frames.shape[2:] == wanted
    assert (frames - 0.7).abs().max() < 0.1


def test_any_float_type_and_values_out_of_range(tmp_path):
    with Recorder(tmp_path / "x.mp4", rate=10) as recorder:
        recorder.write(chunk(torch.full((2, 3, 16, 16), 1.7, dtype=torch.bfloat16)))
        recorder.write(chunk(torch.full((2, 3, 16, 16), -0.7, dtype=torch.float64)))
    assert decoded(recorder.path).mean((1, 2, 3)).round().tolist() == [1, 1, 0, 0]


def children(pid):
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


RECORD_FOR_EVER = """
import sys, time, torch
from millstream.streaming import Chunk, Recorder
recorder = Recorder(sys.argv[1], rate=20, scale=2)
for n in range(100_000):
    recorder.write(Chunk("video", torch.full((1, 3, 32, 32), n % 100 / 100), n, 20.0, 0, 0.0))
    print(n, flush=True)
    time.sleep(0.01)
"""


def start_recording(path, frames):
    process = subprocess.Popen([sys.executable, "-c", RECORD_FOR_EVER, str(path)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) == frames:
            return process
    raise AssertionError("the recording process ended early")


@pytest.mark.skipif(sys.platform != "linux", reason="finds ffmpeg's process in /proc")
def test_a_recording_survives_kill_9_of_python_and_ffmpeg(tmp_path):
    path = tmp_path / "killed.mp4"
    process = start_recording(path, 60)
    encoders = children(process.pid)
    assert encoders, "ffmpeg runs in its own process"
    for pid in (*encoders, process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    frames = decoded(path)
    assert len(frames) >= 60 - 10, "at most half a second is lost"
    assert (frames.mean((1, 2, 3)) - torch.arange(len(frames)) % 100 / 100).abs().max() < 0.04


def test_ctrl_c_leaves_the_encoder_alone(tmp_path):
    path = tmp_path / "interrupted.mp4"
    process = start_recording(path, 40)
    process.send_signal(signal.SIGINT)
    process.wait()
    deadline = time.monotonic() + 5
    while len(frames := decoded(path)) < 38 and time.monotonic() < deadline:
        time.sleep(0.05)  # ffmpeg sees the end of its input and finishes the file by itself
    assert len(frames) >= 38


def test_writing_does_not_wait_for_the_encoder(tmp_path):
    with Recorder(tmp_path / "x.mp4", rate=17.5, scale=4) as recorder:
        data = torch.rand(1, 3, 96, 128)
        recorder.write(chunk(data))
        seconds = []
        for _ in range(60):
            start = time.perf_counter()
            recorder.write(chunk(data))
            seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[30] < 0.01


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("clip.avi", ValueError, r"is an \.mp4 file, got 'clip\.avi'; name it clip\.mp4"),
        ("clip", ValueError, r"is an \.mp4 file"),
        ("missing/clip.mp4", FileNotFoundError, "there is no directory"),
        ("folder.mp4", IsADirectoryError, "is a directory"),
    ],
)
def test_places_that_cannot_be_recorded_to(name, error, message, tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(error, match=message) as caught:
        Recorder(tmp_path / name, rate=10)
    assert "\n" not in str(caught.value)


def test_an_unwritable_file_is_refused_before_the_first_frame():
    with pytest.raises(PermissionError, match=r"cannot record to /proc/clip\.mp4"):
        Recorder("/proc/clip.mp4", rate=10)


@pytest.mark.parametrize(
    "options", [{"rate": 0}, {"rate": float("nan")}, {"rate": 10, "scale": 0}, {"rate": 10, "scale": 1.5}]
)
def test_rates_and_scales_that_mean_nothing(options, tmp_path):
    with pytest.raises(ValueError, match=r"(rate|scale) must be a"):
        Recorder(tmp_path / "x.mp4", **options)


def test_an_older_recording_stays_until_the_first_frame(tmp_path):
    path = tmp_path / "old.mp4"
    path.write_bytes(b"precious")
    Recorder(path, rate=10).close()
    assert path.read_bytes() == b"precious"
    Recorder(tmp_path / "none.mp4", rate=10).close()
    assert not (tmp_path / "none.mp4").exists()


def test_chunks_that_do_not_belong(tmp_path):
    recorder = Recorder(tmp_path / "x.mp4", rate=10)
    recorder.write(chunk(torch.zeros(1, 3, 16, 16)))
    with pytest.raises(ValueError, match="frames are 32x16, the recording began with 16x16"):
        recorder.write(chunk(torch.zeros(1, 3, 32, 16)))
    with pytest.raises(ValueError, match="takes video, got a chunk of audio"):
        recorder.write(Chunk("audio", torch.zeros(1, 100), 0, 16000, 0, 0.0))
    recorder.close()
    recorder.close()
    with pytest.raises(ValueError, match="is closed"):
        recorder.write(chunk(torch.zeros(1, 3, 16, 16)))
    assert len(decoded(recorder.path)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="finds ffmpeg's process in /proc")
def test_an_encoder_that_dies_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("millstream.streaming.recorder.WAITING_BYTES", 0)
    before = set(children(os.getpid()))
    recorder = Recorder(tmp_path / "x.mp4", rate=10)
    recorder.write(chunk(torch.zeros(1, 3, 64, 64)))
    deadline = time.monotonic() + 5
    while not (encoder := set(children(os.getpid())) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(encoder.pop(), signal.SIGKILL)
    with pytest.raises(OSError, match="has stopped"):
        recorder.write(chunk(torch.zeros(200, 3, 64, 64)))  # more than may wait for the encoder
    with pytest.raises(OSError, match="has stopped"):
        recorder.close()
    recorder.close()
