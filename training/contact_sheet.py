"""A picture to judge by eye: what truly happened above, what the model drew below.

Numbers miss a dissolved enemy; a person sees it at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _FAINT = 255, (20, 20, 20), (120, 120, 120)
_GAP, _LINE = 6, 20


def contact_sheet(
    truth: NDArray[np.uint8],
    model: NDArray[np.uint8],
    path: str | os.PathLike[str],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    names: tuple[str, str] = ("truth", "model"),
) -> NDArray[np.uint8]:
    """Write a PNG with a pair of strips per row, `truth` above `model`, and labels; returns the picture [H, W, 3].

    Args:
        truth, model: uint8 RGB [len(rows), len(columns), H, W, 3].
        path: of the PNG; its folder is made if missing.
        rows, columns: labels, one per row (a world) and per column ("+32").
        names: what the upper and the lower strip are called.

    Raises:
        ValueError: shapes that differ, or labels that do not match them.
        OSError: the file cannot be written.
    """
    truth, model = np.asarray(truth), np.asarray(model)
    if truth.dtype != np.uint8 or truth.shape != model.shape or truth.ndim != 5 or truth.shape[-1] != 3:
        raise ValueError(
            "truth and model must be uint8 [rows, columns, H, W, 3] alike, "
            f"got {truth.dtype} {truth.shape} and {model.dtype} {model.shape}"
        )
    if (len(rows), len(columns)) != truth.shape[:2]:
        raise ValueError(f"{len(rows)} row and {len(columns)} column labels, but frames are {truth.shape[:2]}")
    height, width = truth.shape[2:4]
    margin = 8 + 8 * max(len(name) for name in names)
    sheet = np.full((_sheet_height(len(rows), height), margin + len(columns) * (width + 2), 3), _PAPER, np.uint8)
    labels = [(label, margin + column * (width + 2) + 2, _LINE - 6, _INK) for column, label in enumerate(columns)]
    for row, label in enumerate(rows):
        top = _LINE + row * (_LINE + 2 * height + 2 + _GAP)
        labels.append((label, margin + 2, top + _LINE - 6, _INK))
        for strip, (name, frames) in enumerate(zip(names, (truth[row], model[row]))):
            above = top + _LINE + strip * (height + 2)
            labels.append((name, 4, above + height // 2, _FAINT))
            for column, frame in enumerate(frames):
                left = margin + column * (width + 2)
                sheet[above : above + height, left : left + width] = frame
    picture = Image.fromarray(sheet)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for text, x, y, colour in labels:
        pen.text((x, y), text, fill=colour, font=font, anchor="ls")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "PNG")
    return np.array(picture)


def _sheet_height(rows: int, height: int) -> int:
    return _LINE + rows * (_LINE + 2 * height + 2 + _GAP)
