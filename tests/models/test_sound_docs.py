"""The Python of docs/sound_models.md is run as it stands, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "sound_models.md").read_text()


@torch.no_grad()
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "sound_models.md", "exec"), names)
    assert names["clip"].shape == (1, 64, 40)
    assert torch.equal(names["clip"][..., :12], names["latents"][..., :12])
    assert names["sound"].shape == (1, 1, 4 * 1920)
    assert names["block"].shape == (1, 64, 4)
