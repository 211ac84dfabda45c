"""The Python of docs/live.md is run as it stands, but for the address."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from millstream.streaming import VideoFile
from millstream.ui.world import shipped_models

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "live.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)


def run(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(block, str(GUIDE), "exec"), names)
    return names


def test_a_clip_over_http(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    names = run(BLOCKS[0].replace("http://localhost:7860", server.url).replace("70,", "10,"))
    assert len(list(VideoFile(names["clip"]["video"] if isinstance(names["clip"], dict) else names["clip"]))) == 10
    assert "10 frames" in names["told"]


@pytest.mark.skipif(not shipped_models(), reason="this checkout has no model in assets/")
def test_the_page_on_an_app_of_ones_own() -> None:
    from fastapi.testclient import TestClient

    client = TestClient(run(BLOCKS[1])["app"], base_url="http://localhost")
    assert "page/main.js" in client.get("/").text


def test_pictures_and_neighbours_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", GUIDE.read_text()):
        assert (GUIDE.parent / link).is_file(), link
