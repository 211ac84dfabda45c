"""Pictures from an uploaded file, read in a bounded way: bytes, dimensions and duration are checked before decoding.

What a file is, is told by its first bytes. A name says nothing, and a playlist that calls itself a video would make the
decoder fetch whatever it lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...streaming import fit

MAX_BYTES = 64 << 20
MAX_SIDE = 4096
MAX_SECONDS = 60.0
MAX_RATE = 240.0  # frames per second; a file may claim any number, and with it hide how many it has
MAX_VIDEO_PIXELS = 60 * 60 * 1920 * 1080  # of all frames that are decoded: a minute of full HD at 60 frames/s
MAX_SCANS = 64  # of a JPEG; each takes as long to decode as the whole, and millions fit into a file

_IMAGES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG"}
_MATROSKA = b"\x1a\x45\xdf\xa3"


def read_pictures(path: Path, *, size: tuple[int, int], rate: float, most: int) -> list[Tensor]:
    """The pictures of an image (one) or of a video (at `rate` per second), cut to `size` around their middle.

    Args:
        path: a JPEG, PNG or WebP image, or an MP4, MOV, WebM or Matroska video.
        size: (height, width) in pixels.
        rate: frames per second wanted of a video.
        most: of a longer video only the last `most` pictures are kept.

    Returns:
        Pictures [3, height, width] in [0, 1]; at least one.

    Raises:
        ValueError: more bytes, pixels or seconds than are read, or a file of another kind.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"the file has {path.stat().st_size >> 20} MB; at most {MAX_BYTES >> 20} MB are read")
    with path.open("rb") as file:
        start = file.read(16)
    image = next((kind for magic, kind in _IMAGES.items() if start.startswith(magic)), None)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        image = "WEBP"
    if image == "JPEG" and path.read_bytes().count(b"\xff\xda") > MAX_SCANS:
        raise ValueError(f"the image is a JPEG of more than {MAX_SCANS} scans; save it anew")
    if image is not None:
        return [_fit(_read_image(path, image), size)]
    if start[4:8] != b"ftyp" and not start.startswith(_MATROSKA):
        raise ValueError("the file is no image (JPEG, PNG, WebP) and no video (MP4, MOV, WebM) that can be read here")
    pictures: list[Tensor] = []
    for picture in _read_video(path, rate):
        pictures.append(_fit(picture, size))
        del pictures[:-most]
    if not pictures:
        raise ValueError("there is no frame in the video; convert it to MP4 (H.264)")
    return pictures


def _read_image(path: Path, kind: str) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=[kind]) as image:
            _check_side(*image.size)
            upright = ImageOps.exif_transpose(image)
            return np.array(upright.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"the image is damaged: {error}") from None


def _read_video(path: Path, rate: float) -> Iterator[np.ndarray]:
    import cv2

    capture: Any = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise ValueError("the video can't be read; convert it to MP4 (H.264)")
        _check_side(capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        told = capture.get(cv2.CAP_PROP_FPS)
        own_rate = min(told, MAX_RATE) if told > 0 else rate
        index = taken = 0
        shape: tuple[int, ...] | None = None
        while capture.grab():
            if index / own_rate > MAX_SECONDS:
                raise ValueError(f"the video is longer than {MAX_SECONDS:g} seconds; cut it shorter")
            if index / own_rate >= taken / rate:
                taken += 1
                _, picture = capture.retrieve()
                _check_side(picture.shape[1], picture.shape[0])
                shape = shape or picture.shape
                if picture.shape != shape:
                    raise ValueError("the video changes its size on the way; convert it to MP4 (H.264)")
                yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
            index += 1
            if shape is not None and index * shape[0] * shape[1] > MAX_VIDEO_PIXELS:
                raise ValueError("the video has more pixels than a minute of full HD; make it smaller or shorter")
    finally:
        capture.release()


def _check_side(width: float, height: float) -> None:
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"it is {width:.0f} x {height:.0f} pixels; at most {MAX_SIDE} each way are read")


def _fit(picture_HWC: np.ndarray, size: tuple[int, int]) -> Tensor:
    return fit(torch.from_numpy(picture_HWC).permute(2, 0, 1), size)
