"""Imports run downward only: each room may use the rooms below it, and slow optional packages wait for their call."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW = {
    "kernels": set(),
    "samplers": set(),
    "streaming": {"kernels"},
    "models": {"kernels", "streaming"},
    "pipelines": {"kernels", "samplers", "streaming", "models"},
    "training": {"kernels", "samplers", "streaming", "models", "pipelines"},
    "ui": {"kernels", "samplers", "streaming", "models", "pipelines", "training"},
}
INSIDE_FUNCTIONS = {
    "gradio",
    "cv2",
    "imageio",
    "imageio_ffmpeg",
    "vizdoom",
    "gymnasium",
    "ray",
    "pyvirtualcam",
    "sounddevice",
}


def rooms_of(node: ast.ImportFrom, path: Path) -> set[str]:
    """The rooms that a relative import in `path` reaches."""
    package = list(path.relative_to(ROOT).parent.parts)
    target = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
    return {target[0]} if target else {alias.name for alias in node.names}


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: no function bodies, nothing under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        only_types = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        if not only_types and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import(child)


def imported(node: ast.AST) -> set[str]:
    """Top-level packages that an absolute import names."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {node.module.split(".")[0]} if isinstance(node, ast.ImportFrom) and node.module and not node.level else set()


def violations(path: Path) -> list[str]:
    tree, room = ast.parse(path.read_text()), path.relative_to(ROOT).parts[0]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            found += [f"{node.lineno}: reaches {other}" for other in rooms_of(node, path) - BELOW[room] - {room}]
        elif "millstream" in imported(node):
            found.append(f"{node.lineno}: import millstream by name; inside the package imports are relative")
    for node in at_import(tree):
        found += [f"{node.lineno}: {name} at import" for name in imported(node) & INSIDE_FUNCTIONS]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("room", BELOW)
def test_imports_run_downward_only(room: str) -> None:
    found = {str(path.relative_to(ROOT)): violations(path) for path in sorted((ROOT / room).rglob("*.py"))}
    assert found, f"{room} is empty"
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_an_upward_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    module = tmp_path / "kernels" / "noise" / "reference.py"
    module.parent.mkdir(parents=True)
    module.write_text("from ...streaming.types import Chunk\nimport cv2\nfrom ... import ui\nimport millstream\n")
    assert [line.split(": ")[1].split()[0] for line in violations(module)] == ["reaches", "reaches", "import", "cv2"]
