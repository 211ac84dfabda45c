"""`millstream say` as a user meets it, with a tiny speaking model of random weights."""

from __future__ import annotations

import json
import re
import wave
from pathlib import Path
from typing import Any

import pytest

from millstream.pipelines import assets
from millstream.ui import cli
from millstream.ui.commands import say

TOLD = r"first sound \d+ ms · \d+\.\d\d x real time · \d+ underruns?"


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to work in, on a machine without a speaker."""

    def no_speaker() -> None:
        raise OSError("this machine has no speaker; write a file instead, for example -o out.wav")

    monkeypatch.setattr("millstream.streaming.Speaker", no_speaker)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def samples(path: str) -> bytes:
    with wave.open(path) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
        return file.readframes(file.getnframes())


def test_a_text_becomes_a_file(spoken: Path, speech_folder: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["say", "hello there", "--model", str(speech_folder), "--voice", "bob"]
    assert cli.main([*command, "-o", "a.wav"]) == 0
    assert re.fullmatch(rf"a\.wav: \d+\.\d s · {TOLD}\n", capsys.readouterr().out)
    assert cli.main([*command, "-o", "b.wav", "--silent"]) == 0
    assert cli.main([*command, "-o", "c.wav", "--seed", "1"]) == 0
    first, again, other = (samples(f"{name}.wav") for name in "abc")
    assert first == again
    assert first != other


class Ear:
    """A speaker that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.closed = False

    def write(self, chunk: Any) -> None:
        self.heard.append(chunk)

    def close(self) -> None:
        self.closed = True


def test_it_is_heard_where_there_is_a_speaker(
    spoken: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ear = Ear()
    monkeypatch.setattr("millstream.streaming.Speaker", lambda: ear)
    assert cli.main(["say", "hello there", "--model", str(speech_folder)]) == 0
    assert sum(chunk.data.shape[1] for chunk in ear.heard) > 1000
    assert ear.closed
    assert re.fullmatch(rf"{TOLD}\n", capsys.readouterr().out)


def test_ctrl_c_leaves_a_file_that_plays(
    spoken: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Interrupted(Ear):
        def write(self, chunk: Any) -> None:
            super().write(chunk)
            if len(self.heard) == 3:
                raise KeyboardInterrupt

    ear = Interrupted()
    monkeypatch.setattr("millstream.streaming.Speaker", lambda: ear)
    command = ["say", "hello there, " * 20, "--model", str(speech_folder), "-o", "cut.wav"]
    assert cli.main(command) == 130
    heard = sum(chunk.data.shape[1] for chunk in ear.heard)
    assert len(samples("cut.wav")) == 2 * heard
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([""], "the text is empty"),
        (["…"], "there is nothing to say"),
        (["a" * 10_000], "10,000 characters"),
        (["hello", "--voice", "kal"], "voice must be one of ann, bob, got 'kal'"),
        (["hello", "-o", "out.mp3"], "sound is written to a .wav file"),
        (["hello", "-o", "nowhere/out.wav"], "there is no directory nowhere"),
        (["hello", "--model", "elsewhere"], "no model 'elsewhere'"),
        (["hello", "--seed", "-1"], "whole number"),
        (["hello", "--silent"], "--silent leaves the file only"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    spoken: Path, speech_folder: Path, capsys: pytest.CaptureFixture, arguments: list[str], sentence: str
) -> None:
    model = [] if "--model" in arguments else ["--model", str(speech_folder)]
    output = [] if {"-o", "--silent"} & set(arguments) else ["-o", "out.wav"]
    try:
        code = cli.main(["say", *arguments, *model, *output])
    except SystemExit as left:
        code = left.code
    assert code == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.splitlines()[-1].startswith("millstream")
    assert "Traceback" not in told
    assert not Path("out.wav").exists()


def test_without_speaker_and_file_it_says_so(spoken: Path, speech_folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["say", "hello", "--model", str(speech_folder)]) == 2
    assert "this machine has no speaker; write a file instead" in capsys.readouterr().err
    with pytest.raises(OSError, match="no speaker"):
        say.speaker(needed=True)
    assert say.speaker(needed=False) is None


def test_a_copy_without_the_model_says_so(
    spoken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(assets, "ASSETS", spoken)
    assert cli.main(["say", "hello", "-o", "out.wav"]) == 2
    assert "this copy of millstream has no speaking model" in capsys.readouterr().err


def test_bench_measures_speech(speech_folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["bench", "hello there", "--model", str(speech_folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sound_seconds"] > 0
    assert 0 < report["time_to_first_sound"] < 60
    assert report["real_time_factor"] > 0
    assert cli.main(["bench", "hello there", "--model", str(speech_folder)]) == 0
    assert re.search(TOLD, capsys.readouterr().out)
