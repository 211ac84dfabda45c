"""The README's Python is run as it stands, one block after the other, with the model that ships."""

from __future__ import annotations

import re
from pathlib import Path

import imageio.v3 as iio
import pytest

from millstream.ui.world import shipped_models

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.skipif(not shipped_models(), reason="this checkout has no model in assets/")
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    assert len(names["clip"]) == 24
    assert names["frame"].shape[0] == 3
    assert len(iio.imread(tmp_path / "walk.mp4", plugin="FFMPEG")) == 20


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    local = [link for link in links if "://" not in link and not link.startswith(("docs/images/", "assets/"))]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []
