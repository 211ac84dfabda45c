"""Sound on its way: nothing dropped, gaps counted, files complete at any moment."""

from __future__ import annotations

import signal
import sys
import threading
import time
import types
import wave

import numpy as np
import pytest
import torch

from millstream.streaming import (
    Chunk,
    Closed,
    EndOfStream,
    Frame,
    JitterBuffer,
    Metrics,
    Playout,
    Session,
    Speaker,
    SpeechControl,
    WavFile,
    live,
)

RATE = 1000.0


def ramp(start, count):
    return (torch.arange(start, start + count, dtype=torch.float32) / 10_000)[None]


def sound(start=0, count=80, *, rate=RATE, when=0.0):
    return Chunk("audio", ramp(start, count), start, rate, 0, when)


class Speech:
    """Says `length` chunks of 80 samples; a longer text adds to them."""

    rate = 12.5

    def __init__(self, length=5, *, delay=0.0):
        self.length, self.delay, self.heard = length, delay, []

    def check(self, control):
        pass

    def begin(self, control, *, generator=None):
        return {"at": 0}

    def ended(self, state):
        return state["at"] >= self.length

    def advance(self, states, controls, media):
        time.sleep(self.delay)
        self.heard += [float(frame.data[0, 0]) for frame in media if frame is not None]
        drawn = []
        for state in states:
            drawn.append([] if self.ended(state) else [sound(80 * state["at"], when=time.monotonic())])
            state["at"] += 1
        return drawn

    def flush(self, state):
        return []

    def end(self, state):
        pass


class Ear:
    def __init__(self):
        self.chunks, self.times = [], []

    def write(self, chunk):
        self.chunks.append(chunk)
        self.times.append(time.monotonic())

    def close(self):
        pass


def test_what_goes_in_comes_out_in_order_whatever_the_sizes():
    buffer = JitterBuffer(RATE, lead=0, capacity=0.1)
    heard, given = [], 0
    for count in (7, 60, 33, 1, 90, 100, 13):
        buffer.write(ramp(given, count))
        given += count
        while len(buffer):
            heard.append(buffer.read(min(len(buffer), 29)))
    assert torch.equal(torch.cat(heard, dim=1), ramp(0, given))
    assert buffer.position == pytest.approx(given / RATE)
    assert buffer.underruns == 0


def test_playing_waits_for_the_lead_and_gathers_it_again_after_a_gap():
    buffer = JitterBuffer(RATE, lead=0.1)
    buffer.write(ramp(0, 60))
    assert not buffer.read(50).any()
    assert (buffer.played, buffer.underruns) == (0, 0)  # it has not begun, so nothing was missed
    buffer.write(ramp(60, 60))
    assert torch.equal(buffer.read(100), ramp(0, 100))
    gap = buffer.read(50)
    assert torch.equal(gap[:, :20], ramp(100, 20))
    assert not gap[:, 20:].any()
    assert (buffer.underruns, buffer.silence) == (1, 30)
    buffer.write(ramp(120, 60))
    assert not buffer.read(10).any()  # gathering again
    assert buffer.underruns == 1
    buffer.write(ramp(180, 60))
    assert torch.equal(buffer.read(120), ramp(120, 120))


def test_the_end_is_played_without_its_lead_and_is_no_underrun():
    buffer = JitterBuffer(RATE, lead=0.1)
    buffer.write(ramp(0, 30))
    buffer.finish()
    assert torch.equal(buffer.read(50)[:, :30], ramp(0, 30))
    assert buffer.drained
    assert (buffer.underruns, buffer.silence) == (0, 0)


def test_a_full_buffer_makes_the_writer_wait_and_loses_nothing():
    buffer = JitterBuffer(RATE, lead=0, capacity=0.05)
    writer = threading.Thread(target=lambda: [buffer.write(ramp(0, 200)), buffer.finish()], daemon=True)
    writer.start()
    heard = torch.zeros(1, 0)
    deadline = time.monotonic() + 5
    while not buffer.drained and time.monotonic() < deadline:
        heard = torch.cat([heard, buffer.read(min(20, len(buffer)))], dim=1)
    writer.join(5)
    assert torch.equal(heard, ramp(0, 200))


def test_a_buffer_refuses_what_it_cannot_hold():
    buffer = JitterBuffer(RATE, capacity=0.2)
    with pytest.raises(ValueError, match=r"sound is \[1, samples\] here, got \[2, 5\]"):
        buffer.write(torch.zeros(2, 5))
    with pytest.raises(TimeoutError, match="nobody played"):
        buffer.write(torch.zeros(1, 300), timeout=0.01)
    buffer.close()
    with pytest.raises(Closed):
        buffer.write(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="lead must lie between 0 and capacity"):
        JitterBuffer(RATE, lead=3, capacity=2)


def test_an_ideal_listener_counts_gaps_from_times_alone():
    listener = Playout(lead=0.1)
    for now in (0.0, 0.07, 0.17, 0.25):  # 0.08 s each: all come before 0.1 + what was delivered
        listener.arrived(now, 0.08)
    assert listener.underruns == 0
    listener.arrived(0.43, 0.08)  # heard until 0.42
    assert listener.underruns == 1
    listener.arrived(0.60, 0.08)  # the lead was gathered again: heard until 0.61
    assert listener.underruns == 1
    listener.paused()
    listener.arrived(9.0, 0.08)  # a meant silence
    assert listener.underruns == 1


def test_metrics_tell_the_real_time_factor_and_the_first_sound():
    clock = types.SimpleNamespace(now=10.0)
    metrics = Metrics(clock=lambda: clock.now)
    for chunks in ([], [sound()], [sound()]):
        start, clock.now = clock.now, clock.now + 0.02
        metrics.stepped(start, chunks, 0)
    assert metrics.time_to_first_sound == pytest.approx(0.04)
    assert metrics.sound_seconds == pytest.approx(0.16)
    assert metrics.real_time_factor == pytest.approx(0.06 / 0.16)
    clock.now = 11.0
    metrics.delivered(sound())
    clock.now = 12.0
    metrics.delivered(sound())
    assert metrics.as_dict()["underruns"] == 1


def test_chunks_end_with_the_text_and_go_on_when_there_is_more():
    pipeline = Speech(3)
    with Session(pipeline, SpeechControl(text="a")) as session:
        assert not session.ended
        assert len(list(session.chunks())) == 3
        assert session.ended
        assert session.step() == []
        session.steer(text="a b")
        assert not session.ended
        pipeline.length = 6
        assert [chunk.start for chunk in session.chunks()] == [320, 400]


def test_live_ends_with_the_text_and_makes_sound_ahead_of_its_time():
    ear = Ear()
    metrics = live(None, Session(Speech(10), SpeechControl()), ear)
    assert metrics.ended == "source"
    assert [chunk.start for chunk in ear.chunks] == list(range(0, 800, 80))
    made_ahead = [0.08 * index - (when - ear.times[0]) for index, when in enumerate(ear.times)]
    assert made_ahead[4] > 0.2  # five chunks at once, not one every 80 ms
    assert max(made_ahead) < 0.6
    assert metrics.underruns == 0


def test_live_counts_the_gaps_of_a_model_that_is_too_slow():
    metrics = live(None, Session(Speech(5, delay=0.25), SpeechControl()), Ear())
    assert metrics.underruns == 4
    assert metrics.real_time_factor > 2.5


class Microphone:
    kind = "audio"

    def __init__(self, blocks):
        self.left = list(range(blocks))

    def read(self):
        if not self.left:
            raise EndOfStream
        return Frame(torch.full((1, 80), float(self.left.pop(0))), time.monotonic())

    def close(self):
        pass


def test_a_microphone_loses_nothing_to_a_slow_model():
    pipeline = Speech(1000, delay=0.005)
    live(Microphone(20), Session(pipeline, SpeechControl()), Ear())
    assert pipeline.heard == list(range(20))


def read_wav(path):
    with wave.open(str(path)) as file:
        data = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
        return file.getframerate(), torch.from_numpy(data.T.copy()) / 32767


def test_a_wav_file_is_complete_after_every_chunk(tmp_path):
    path = tmp_path / "out.wav"
    file = WavFile(path)
    assert not path.exists()
    for index in range(3):
        file.write(sound(80 * index))
        rate, data = read_wav(path)  # as if the process were killed here
        assert rate == 1000
        assert data.shape == (1, 80 * (index + 1))
    file.close()
    file.close()
    assert torch.allclose(read_wav(path)[1], ramp(0, 240), atol=1 / 32767)
    assert file.seconds == pytest.approx(0.24)
    with pytest.raises(ValueError, match="is closed"):
        file.write(sound())


def test_a_wav_file_survives_an_interrupt(tmp_path):
    path = tmp_path / "out.wav"
    threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT)).start()
    metrics = live(None, Session(Speech(10_000, delay=0.01), SpeechControl()), WavFile(path))
    assert metrics.ended == "interrupt"
    _, data = read_wav(path)
    assert data.shape[1] == round(metrics.sound_seconds * RATE) > 0


def test_a_wav_file_refuses_bad_paths_and_mixed_sound(tmp_path):
    with pytest.raises(ValueError, match=r"written to a \.wav file, got 'out.mp3'; name it out.wav"):
        WavFile(tmp_path / "out.mp3")
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        WavFile(tmp_path / "none" / "out.wav")
    file = WavFile(tmp_path / "out.wav")
    file.write(sound())
    with pytest.raises(ValueError, match="sound is now 1 x 2000 Hz"):
        file.write(sound(rate=2000.0))
    file.write(Chunk("video", torch.zeros(1, 3, 2, 2), 0, 1.0, 0, 0.0))
    assert file.samples == 80
    file.close()


class FakeDevices(types.ModuleType):
    """A device that asks for 40 samples every 4 ms, ten times as fast as it should, so that the test is short."""

    PortAudioError = type("PortAudioError", (Exception,), {})

    def __init__(self, *, speakers=True):
        super().__init__("sounddevice")
        self.speakers, self.heard = speakers, []

    def query_devices(self, kind):
        if not self.speakers:
            raise self.PortAudioError("no default output device")

    def OutputStream(self, *, samplerate, channels, dtype, callback):
        devices, stop = self, threading.Event()

        def play():
            while not stop.wait(0.004):
                block = np.zeros((40, channels), "float32")
                callback(block, 40, None, None)
                devices.heard.append(block.copy())

        thread = threading.Thread(target=play, daemon=True)
        return types.SimpleNamespace(start=thread.start, stop=stop.set, close=thread.join)


def test_a_speaker_plays_everything_and_is_the_clock(monkeypatch):
    devices = FakeDevices()
    monkeypatch.setitem(sys.modules, "sounddevice", devices)
    speaker = Speaker()
    start = time.monotonic()
    metrics = live(None, Session(Speech(30), SpeechControl()), speaker)  # 2.4 s, which this device plays in 0.24 s
    assert time.monotonic() - start < 2.0  # by our own clock it would take 2.4 s less what is made ahead
    heard = torch.from_numpy(np.concatenate(devices.heard))[:, 0]
    assert torch.equal(heard[heard > 0], ramp(0, 2400)[0, 1:])
    assert metrics.ended == "source"
    assert speaker.position == pytest.approx(2.4)
    assert speaker.underruns == 0


def test_a_speaker_that_is_not_there_is_told_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", FakeDevices(speakers=False))
    with pytest.raises(OSError, match=r"this machine has no speaker; write a file instead, .* -o out\.wav"):
        Speaker()
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(ImportError, match=r'pip install "millstream\[speaker\]"'):
        Speaker()
