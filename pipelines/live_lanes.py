"""Where live pictures are drawn: in lanes, so that a GPU is at two pictures at once while others come and go.

One picture at a time leaves a large GPU half idle: many of a network's layers are too small to fill it, and nothing is
drawn while pixels are copied. So a pipeline that overlaps draws every tick in the other one of two lanes, each a CUDA
stream with recorded steps and working memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..streaming.graphs import Recordings


class Lane:
    """Steps recorded in one place, and the stream they run on. Lanes share weights and nothing else.

    Args:
        device: of the weights.
        own_stream: whether work goes on beside the caller's; of no effect on other devices than CUDA.
    """

    def __init__(self, device: torch.device, *, own_stream: bool) -> None:
        self.recordings = Recordings(device)
        self._stream = torch.cuda.Stream(device) if own_stream and device.type == "cuda" else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within, work goes to this lane, after what the caller has asked of the device before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def done(self) -> torch.cuda.Event | None:
        """What other lanes wait for before they read what has been written here."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def receive(self, ready: torch.cuda.Event | None, *tensors: Tensor) -> None:
        """Read tensors of another lane here, when they are ready; their memory is not given to others before."""
        if self._stream is None:
            return
        if ready is not None:
            self._stream.wait_event(ready)
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def own(self, picture: Tensor) -> Tensor:
        """A picture that its giver may overwrite as soon as the tick has been asked for; called before the lane is
        entered."""
        if self._stream is None:
            return picture
        if picture.is_cuda:
            return picture.clone()
        return torch.empty(picture.shape, dtype=picture.dtype, pin_memory=True).copy_(picture)

    def upload(self, picture: Tensor) -> Tensor:
        """What `own` gave, on the device, without waiting where that is possible."""
        if self._stream is None:
            return picture.to(self.recordings.device)
        if picture.is_cuda:
            self.receive(None, picture)
        return picture.to(self.recordings.device, non_blocking=True)


class Arriving:
    """A picture [1, 3, H, W] in bytes, on its way to the host; made in the lane that draws it."""

    def __init__(self, picture: Tensor, lane: Lane) -> None:
        self._host = torch.empty(picture.shape, dtype=picture.dtype, pin_memory=picture.is_cuda)
        self._host.copy_(picture, non_blocking=picture.is_cuda)
        self._done = lane.done()

    def wait(self) -> Tensor:
        """The picture in floats from 0 to 1, as soon as it is there."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.float().div_(255)
