"""What `import millstream as ms` promises: these names, at no cost until one is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import millstream as ms

NAMES = [
    "AudioPipeline",
    "Camera",
    "Chunk",
    "Control",
    "Frame",
    "ImageControl",
    "ImagePipeline",
    "LiveImagePipeline",
    "Recorder",
    "Session",
    "SpeechControl",
    "VideoControl",
    "VideoFile",
    "VideoPipeline",
    "Window",
    "WorldControl",
    "WorldPipeline",
    "live",
]


def test_public_names_are_pinned() -> None:
    assert ms.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there(name: str) -> None:
    assert getattr(ms, name).__name__ == name
    assert name in dir(ms)


def test_editors_see_the_same_names() -> None:
    tree = ast.parse(Path(ms.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(seen) == NAMES


def test_unknown_name_is_refused_with_the_list() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Wordl'; it has AudioPipeline, .*WorldPipeline"):
        ms.Wordl  # noqa: B018


def test_version_is_that_of_the_project() -> None:
    project = (Path(ms.__file__).parent / "pyproject.toml").read_text()
    assert f'version = "{ms.__version__}"' in project


def in_a_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_is_quick_and_pulls_in_nothing_heavy() -> None:
    seconds, modules = in_a_new_process(
        "import sys, time; start = time.perf_counter(); import millstream;"
        "print(time.perf_counter() - start); print(*sys.modules)"
    ).splitlines()
    assert float(seconds) < 0.5
    assert not {"torch", "diffusers", "cv2", "numpy", "gradio"} & set(modules.split())


def test_command_line_parser_pulls_in_nothing_heavy() -> None:
    modules = in_a_new_process("import sys; from millstream.ui import cli; cli.parser(); print(*sys.modules)")
    assert not {"torch", "diffusers", "cv2", "numpy", "gradio"} & set(modules.split())
