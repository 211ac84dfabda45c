"""Any picture as a pipeline wants it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def fit(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of `picture` at another size: cut to the shape of `size`, then shrunk by area or enlarged smoothly.

    Args:
        picture: [3, H, W], floats in [0, 1] or uint8, at least one pixel each way.
        size: (height, width), such as a pipeline's `size`.

    Returns:
        [3, height, width], float32 in [0, 1]; `picture` itself if it is that already.

    Raises:
        ValueError: `picture` is not one colour picture.
    """
    if picture.ndim != 3 or picture.shape[0] != 3 or 0 in picture.shape:
        raise ValueError(f"a picture must be [3, H, W], got {list(picture.shape)}")
    if not picture.is_floating_point() and picture.dtype != torch.uint8:
        raise ValueError(f"a picture must be in floats from 0 to 1 or in uint8, got {picture.dtype}")
    height, width = picture.shape[1:]
    if (height, width) == tuple(size) and picture.dtype == torch.float32:
        return picture
    scale = min(height / size[0], width / size[1])
    high, wide = (min(side, max(1, round(scale * wanted))) for side, wanted in zip((height, width), size))
    top, left = (height - high) // 2, (width - wide) // 2
    middle = picture[:, top : top + high, left : left + wide]
    if middle.device.type == "cpu":
        return _on_the_cpu(middle, size)
    middle = (middle.float() / 255 if middle.dtype == torch.uint8 else middle.float())[None]
    return F.interpolate(middle, size, mode="bilinear", align_corners=False, antialias=True)[0]


def _on_the_cpu(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """By OpenCV, which weighs every pixel by its area, and is several times as fast as PyTorch."""
    import cv2

    pixels_HWC = picture.permute(1, 2, 0).contiguous()
    pixels_HWC = pixels_HWC if pixels_HWC.dtype == torch.uint8 else pixels_HWC.float()
    shrinks = picture.shape[1] >= size[0] and picture.shape[2] >= size[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized_HWC = torch.from_numpy(cv2.resize(pixels_HWC.numpy(), size[::-1], interpolation=how))
    resized = resized_HWC.permute(2, 0, 1).contiguous()
    return resized.float().div_(255) if resized.dtype == torch.uint8 else resized
