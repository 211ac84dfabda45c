"""Pictures and masks to paint into, in the forms callers have them, as tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

PAPER = 1.0  # what stands where nothing is drawn yet: white


class Canvas(NamedTuple):
    """`picture` [3, S, S] in [0, 1], paper in the holes; `hole` bool [S, S], where to paint."""

    picture: Tensor
    hole: Tensor


def read_canvas(image: Any, mask_image: Any, size: int) -> Canvas | None:
    """What a call of an image pipeline is to paint into; None without an image.

    Args:
        image: PIL picture, array uint8 or float [H, W, 3 or 4], or tensor [3 or 4, H, W] in [0, 1]. Without a mask its
            fourth channel says where to paint: where it is transparent.
        mask_image: PIL picture, array or tensor [H, W]; paint where it is above a half (white), as in diffusers.
        size: S; both are scaled to it.

    Raises:
        ValueError: a mask without an image, an image without a mask or transparency, or shapes that are no pictures.
    """
    if image is None:
        if mask_image is not None:
            raise ValueError("mask_image says where to paint in an image; give image= too")
        return None
    picture = _scaled(_channels_first(image, "image"), size)
    if mask_image is not None:
        hole = _touched(_channels_first(mask_image, "mask_image")[0] > 0.5, size)
    elif picture.shape[0] == 4:
        hole = picture[3] < 0.5
    else:
        raise ValueError("an image needs mask_image= (white where to paint), or transparent parts to paint into")
    if picture.shape[0] not in (3, 4):
        raise ValueError(f"image must have 3 or 4 channels, got {picture.shape[0]}")
    return Canvas(picture[:3].masked_fill(hole, PAPER), hole)


def open_cells(hole: Tensor, side: int) -> Tensor:
    """Which cells of a grid [side, side] a hole [S, S] touches: bool [side * side]. They are to be drawn anew."""
    return F.adaptive_max_pool2d(hole[None].float(), side)[0].flatten() > 0


def enlarged(cells: Tensor, size: int) -> Tensor:
    """bool [B, side * side] as [B, 1, size, size]."""
    side = round(cells.shape[1] ** 0.5)
    return F.interpolate(cells.float().view(-1, 1, side, side), size=(size, size)) > 0.5


def _channels_first(picture: Any, name: str) -> Tensor:
    """Any picture as float [C, H, W] in [0, 1]."""
    if isinstance(picture, Tensor):
        tensor = picture.detach().cpu()
        tensor = tensor[0] if tensor.ndim == 4 and len(tensor) == 1 else tensor
    else:
        array = np.array(_plain(picture, name))
        if array.dtype.kind not in "bf" and array.dtype != np.uint8:
            raise ValueError(
                f"{name} must be a PIL picture, an array of uint8 or floats, or a tensor, "
                f"got {type(picture).__name__} of {array.dtype}"
            )
        tensor = torch.from_numpy(array.transpose(2, 0, 1) if array.ndim == 3 else array)
    tensor = tensor[None] if tensor.ndim == 2 else tensor
    if tensor.ndim != 3 or 0 in tensor.shape:
        raise ValueError(
            f"{name} must be one picture [H, W], [H, W, C] or a tensor [C, H, W], got {list(tensor.shape)}"
        )
    values = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    if not 0 <= float(values.min()) <= float(values.max()) <= 1:
        raise ValueError(
            f"the values of {name} must be in [0, 1], or uint8, got {float(values.min()):g} to {float(values.max()):g}"
        )
    return values


def _plain(picture: Any, name: str) -> Any:
    """A PIL picture without palette and the like; anything else as it is."""
    if not isinstance(picture, Image.Image):
        return picture
    if name == "mask_image":
        return picture.convert("L")
    transparent = "A" in picture.getbands() or "transparency" in picture.info
    return picture.convert("RGBA" if transparent else "RGB")


def _touched(hole: Tensor, size: int) -> Tensor:
    """A hole bool [H, W] at another size, [S, S]: a thin line does not vanish when it is shrunk."""
    shrunk = F.adaptive_max_pool2d(hole[None].float(), (min(size, hole.shape[0]), min(size, hole.shape[1])))
    return F.interpolate(shrunk[None], size=(size, size))[0, 0] > 0.5


def _scaled(picture: Tensor, size: int) -> Tensor:
    if picture.shape[1:] == (size, size):
        return picture
    return F.interpolate(picture[None], size=(size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)
