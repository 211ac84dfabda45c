"""The models that ship with the package: one folder each, in `save_pretrained` layout."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def shipped(name: str | Path) -> Path | None:
    """The folder of the shipped model `name`, None if there is no such."""
    folder = ASSETS / str(name)
    return folder if (folder / "model_index.json").is_file() else None
