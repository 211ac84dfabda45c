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
    middle = picture[None, :, top : top + high, left : left + wide]
    middle = middle.float() / 255 if picture.dtype == torch.uint8 else middle.float()
    if high >= size[0] and wide >= size[1]:
        return F.interpolate(middle, size, mode="area")[0]
    return F.interpolate(middle, size, mode="bilinear", align_corners=False)[0]
