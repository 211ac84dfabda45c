"""The Python of docs/sound.md is run as it stands, with a tiny model in the place of the one that ships."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from millstream.pipelines.audio import AudioPipeline

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "sound.md").read_text()


class Ear:
    def __init__(self) -> None:
        self.samples = 0

    def write(self, chunk) -> None:
        self.samples += chunk.data.shape[1]


def test_python_blocks_run(speech_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = AudioPipeline.from_pretrained(speech_folder)
    tiny.transformer.register_to_config(voices=["slt", "rms"])
    monkeypatch.setattr(AudioPipeline, "from_pretrained", lambda name: {"speech": tiny}[name])
    words, ear = iter(["how are you", "today"]), Ear()
    names: dict = {"speaker": ear, "next_words": lambda: next(words, None)}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "sound.md", "exec"), names)
    assert names["out"].audios.shape[0] == 1
    assert next(words, None) is None
    assert ear.samples > tiny("hello there").audios.shape[1]
    assert Path("anna.safetensors").is_file()
