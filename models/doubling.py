"""Pictures doubled each way and then convolved, without the doubled pictures: 4 of 9 products, fewer reads."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def phases(weight: Tensor) -> Tensor:
    """A kernel [out, in, 3, 3] over pictures in which each pixel stands twice each way, for the pictures as they are.

    Of a doubled picture an output pixel sees two pixels each way: a pair of the kernel's rows falls on one of them, and
    which pair, on whether it is the first or the second of its twins. So there are four kernels of 2 x 2, each with
    the sums of what falls together: [4 out, in, 2, 2] for `interleaved`.
    """
    rows = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device=weight.device, dtype=torch.float32)
    sums = torch.einsum("apk,bql,oikl->aboipq", rows, rows, weight.float())
    return sums.flatten(0, 2).to(weight.dtype).contiguous(memory_format=torch.channels_last)


def interleaved(x: Tensor) -> Tensor:
    """What `phases` makes of padded pictures, [N, 4 C, h + 1, w + 1], as pictures [N, C, 2 h, 2 w], channels-last."""
    x = x.permute(0, 2, 3, 1).contiguous()
    count, height, width, channels = x.shape
    height, width, channels = height - 1, width - 1, channels // 4
    picture, row, column, _ = x.stride()
    # A second twin sees from one place further on, and lies one (or two) kernels further on.
    twins = (picture, row, row + 2 * channels, column, column + channels, 1)
    x = x.as_strided((count, height, 2, width, 2, channels), twins)
    out = x.new_empty((count, 2 * height, 2 * width, channels))
    to = out.view(x.shape)
    if channels * x.itemsize % 8 == 0:  # numbers of 8 bytes are copied faster than the same as numbers of 2
        to, x = to.view(torch.int64), x.view(torch.int64)
    to.copy_(x)
    return out.permute(0, 3, 1, 2)


ALIGNED = 8  # output channels that tensor cores are fed with a multiple of
Weights = tuple[Tensor, Tensor | None]  # and bias


def aligned(weight: Tensor, bias: Tensor) -> Weights:
    """The same convolution with outputs of nothing behind its own, which costs less than to do without them."""
    missing = -weight.shape[0] % ALIGNED
    order = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
    padded = F.pad(weight, (0, 0) * (weight.ndim - 1) + (0, missing))
    return padded.contiguous(memory_format=order), F.pad(bias, (0, missing))


def renew(made: dict[nn.Module, Weights], now: Iterable[tuple[nn.Module, Weights]]) -> None:
    """Let `made` hold these weights, in the same place where there is one: recorded steps read it."""
    for layer, weights in now:
        before = made.get(layer)
        if before is None or (before[0].device, before[0].dtype) != (weights[0].device, weights[0].dtype):
            made[layer] = weights
            continue
        for old, new in zip(before, weights):
            if old is not None and new is not None:
                old.copy_(new)
