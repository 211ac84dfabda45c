"""Pictures on their way in and out. What comes in is measured from its header before anything decodes it."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ...streaming import fit
from .protocol import JPEG, WEBP, Refused

MAX_SIDE = 4096
MAX_PIXELS = 4 * 2**20  # a 1080p camera has half of this
# What may stand before a JPEG's frame, each with its length. Decoders skip other markers in ways of their own, so
# that a file could have one frame for us, and another, larger one for them.
_SEGMENTS = frozenset({0xC4, 0xCC, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)})
# WebP needs half the bytes for the same error, and 20 to 40 times the time: 0.9 ms at 96x128, 32 ms at 480x640. So only
# a small frame is WebP, and only on a way so narrow that quality had to fall this far.
WEBP_PIXELS, WEBP_QUALITY = 2**15, 50


def dimensions(image: bytes) -> tuple[int, int]:
    """(height, width) that the header of a JPEG or WebP picture states; nothing is decoded.

    Sources: ITU-T T.81 B.2.2 (frame header), RFC 9649 (WebP).

    Raises:
        Refused: another format, a damaged header, a progressive or lossless JPEG, or an animation. A progressive
            picture of two megabytes may hold thousands of scans, each as long to decode as the whole.
    """
    try:
        if image[:2] == b"\xff\xd8":
            return _jpeg_dimensions(image)
        if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
            return _webp_dimensions(image)
    except (IndexError, struct.error):
        raise Refused("the camera picture is cut short") from None
    raise Refused("a camera picture is a JPEG or a WebP")


def _jpeg_dimensions(image: bytes) -> tuple[int, int]:
    position = 2
    while True:
        if image[position] != 0xFF:
            raise Refused("the camera picture is a damaged JPEG")
        marker = image[position + 1]
        if marker == 0xFF:  # padding
            position += 1
        elif marker in (0xC0, 0xC1):
            height, width = struct.unpack_from(">HH", image, position + 5)
            return height, width
        elif 0xC2 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            raise Refused("the camera picture is a progressive or lossless JPEG; send a baseline one, or WebP")
        elif marker in (0xD9, 0xDA):
            raise Refused("the camera picture is a JPEG without a frame")
        elif marker not in _SEGMENTS:
            raise Refused("the camera picture is a damaged JPEG")
        else:
            (length,) = struct.unpack_from(">H", image, position + 2)
            position += 2 + max(2, length)


def _webp_dimensions(image: bytes) -> tuple[int, int]:
    kind = image[12:16]
    if kind == b"VP8 ":
        if image[23:26] != b"\x9d\x01\x2a":
            raise Refused("the camera picture is a damaged WebP")
        width, height = struct.unpack_from("<HH", image, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", image, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8X":
        if image[20] & 0x02:
            raise Refused("the camera picture is an animation; send single pictures")
        return 1 + int.from_bytes(image[27:30], "little"), 1 + int.from_bytes(image[24:27], "little")
    raise Refused("the camera picture is a damaged WebP")


def decode(image: bytes, size: tuple[int, int]) -> Tensor:
    """A camera picture as the pipeline takes it: cut to its shape around the middle, resized, [3, H, W] in [0, 1].

    Args:
        image: JPEG or WebP.
        size: (height, width) of the result.

    Raises:
        Refused: not such a picture, damaged, or larger than `MAX_PIXELS`.
    """
    import cv2
    import numpy as np

    height, width = dimensions(image)
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE and height * width <= MAX_PIXELS):
        raise Refused(f"the camera picture is {width}x{height}; at most {MAX_PIXELS:,} pixels are read")
    flag = cv2.IMREAD_COLOR
    if height >= 2 * size[0] and width >= 2 * size[1]:
        flag = cv2.IMREAD_REDUCED_COLOR_2  # JPEG decodes to half size in half the time
    try:
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), flag)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise Refused("the camera picture is damaged")
    return fit(torch.from_numpy(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)).permute(2, 0, 1), size)


def encode(picture: Tensor, formats: tuple[str, ...], quality: int) -> tuple[int, bytes]:
    """A frame [3, H, W] in [0, 1] as (format, bytes); WebP where the client likes it best and bytes are scarce."""
    import cv2
    import numpy as np

    # By NumPy: a second thread in PyTorch's pool would slow the one that draws (see `streaming.threads`).
    floats = picture.detach().permute(1, 2, 0).float().cpu().numpy()
    pixels = np.rint(np.clip(floats, 0, 1) * 255).astype(np.uint8)
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    small = bgr.shape[0] * bgr.shape[1] <= WEBP_PIXELS
    if "jpeg" not in formats or (formats[0] == "webp" and small and quality < WEBP_QUALITY):
        _, data = cv2.imencode(".webp", bgr, [cv2.IMWRITE_WEBP_QUALITY, quality])
        return WEBP, data.tobytes()
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    if small:  # is enlarged on the screen, where coarse colours would show
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    _, data = cv2.imencode(".jpg", bgr, options)
    return JPEG, data.tobytes()
