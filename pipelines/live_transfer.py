"""Pictures on their way between the host and a GPU while the GPU goes on drawing."""

from __future__ import annotations

import torch
from torch import Tensor


class Arriving:
    """A picture, copied to the host in the background.

    Args:
        picture: uint8 or float [1, 3, H, W], on any device, complete once its device's current stream is.
        stream: the stream that copies; None where there is nothing to copy from.
    """

    def __init__(self, picture: Tensor, stream: torch.cuda.Stream | None) -> None:
        if stream is None:
            self._host, self._done = picture.cpu(), None
            return
        stream.wait_stream(torch.cuda.current_stream(picture.device))
        with torch.cuda.stream(stream):
            self._host = torch.empty(picture.shape, dtype=picture.dtype, pin_memory=True)
            self._host.copy_(picture, non_blocking=True)
            picture.record_stream(stream)  # its memory is not given to others before it has been read
            self._done = stream.record_event()

    def wait(self) -> Tensor:
        """The picture in floats from 0 to 1, as soon as it is there."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.float().div_(255) if self._host.dtype == torch.uint8 else self._host


def upload(picture: Tensor, device: torch.device, stream: torch.cuda.Stream | None) -> Tensor:
    """`picture` on `device`, by `stream` if there is one: beside the frame that is being drawn."""
    if stream is None or picture.device.type != "cpu":
        return picture.to(device)
    with torch.cuda.stream(stream):
        moved = picture.pin_memory().to(device, non_blocking=True)
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    moved.record_stream(current)
    return moved
