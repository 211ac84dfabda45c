"""Steps that are recorded once and replayed: a CUDA graph per kind of step, over buffers with fixed addresses.

A step of a stream is hundreds of small kernels, and starting them takes longer than running them. A CUDA graph starts
them all at once. It replays exactly what was done to exactly the same memory, so a step that is to be recorded must
depend on nothing but its inputs and on tensors that stay where they are: numbers on the host are baked in.
"""

from __future__ import annotations

import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor

Step = Callable[..., Tensor | None]
_recording = RLock()  # PyTorch takes one capture at a time in a process


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within, nobody else records and no garbage is collected: an old graph that is destroyed while a new one is
    captured spoils the new one."""
    with _recording:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Within, cuDNN tries which convolutions are fastest at sizes it has not met: seconds, which a recording keeps."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Replay(Protocol):
    """A recorded step. Called with new inputs it returns what the step would, in a new tensor."""

    def __call__(self, *inputs: Tensor) -> Tensor | None: ...


class CudaReplay:
    """A step as a CUDA graph.

    Recording does not run the step. It must have run before, so that kernels are compiled and libraries are awake.
    Other threads may use the device meanwhile, but not PyTorch's own generator of random numbers on it, which refuses
    to draw while anything is recorded: give `torch.rand` and the like a generator.

    Args:
        step: a function of tensors without reads on the host.
        inputs: tensors like those it will be called with, on any device.
        device: the CUDA device it runs on.
        pool: memory that several recordings share, from `torch.cuda.graph_pool_handle()`. They may be replayed in any
            order, but not at the same time.
        stream: where to record, one for all that share a pool: libraries keep working memory for every stream they see.
    """

    def __init__(
        self, step: Step, inputs: Sequence[Tensor], device: torch.device, pool: Any, stream: torch.cuda.Stream
    ) -> None:
        with torch.cuda.device(device):
            self._inputs = [value.to(device, copy=True) for value in inputs]
            self._step = step  # which holds tensors that the graph reads
            self._graph = torch.cuda.CUDAGraph()
            # Threads that have nothing to do with this stream may go on using CUDA meanwhile.
            with (
                undisturbed(),
                torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                self._output = step(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor | None:
        for buffer, value in zip(self._inputs, inputs, strict=True):
            buffer.copy_(value, non_blocking=True)
        self._graph.replay()
        # The next replay, of this graph or of another one in its pool, overwrites the output.
        return None if self._output is None else self._output.clone()


class Recordings:
    """The recorded steps of one set of buffers.

    A kind of step is run as it is until it has been asked for `patience` times, so that what passes quickly is not
    recorded. The least recently used recording makes room for a new one.

    Args:
        device: where the steps run. Other devices than CUDA have no graphs: steps are run as they are.
        patience: runs before a kind of step is recorded.
        limit: recordings that are kept; each holds some megabytes of the device's memory.
        record: makes a recording from a step and its inputs; a CUDA graph by default.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        patience: int = 3,
        limit: int = 24,
        record: Callable[[Step, Sequence[Tensor]], Replay] | None = None,
    ) -> None:
        self.device, self.patience, self.limit = device, patience, limit
        self._record = record if record is not None or device.type != "cuda" else self._record_cuda
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._weights: list[int] = []
        self._replays: OrderedDict[Hashable, Replay | None] = OrderedDict()  # None: it cannot be recorded
        self._seen: OrderedDict[Hashable, int] = OrderedDict()

    @property
    def records(self) -> bool:
        """Whether steps are recorded here at all."""
        return self._record is not None

    def __len__(self) -> int:
        return sum(replay is not None for replay in self._replays.values())

    def run(self, kind: Hashable, step: Step, inputs: Sequence[Tensor]) -> Tensor | None:
        """`step(*inputs)`, replayed if this kind of step is recorded.

        Args:
            kind: everything a step depends on besides its inputs. Steps of one kind, with inputs of the same shapes and
                dtypes, must do the same.
            step: a function of tensors on `device`; see `CudaReplay`.
            inputs: on `device` or on the host.
        """
        if self._record is None:
            return step(*(value.to(self.device) for value in inputs))
        inputs = [value.contiguous() for value in inputs]  # as the buffers are, since kernels are chosen by layout
        kind = (kind, *((value.shape, value.dtype) for value in inputs))
        if kind in self._replays:
            self._replays.move_to_end(kind)
            replay = self._replays[kind]
            if replay is not None:
                return replay(*inputs)
        output = step(*(value.to(self.device, non_blocking=True) for value in inputs))
        if kind not in self._replays and self._is_steady(kind):
            self._replays[kind] = self._recorded(step, inputs)
            if len(self._replays) > self.limit:
                self._replays.popitem(last=False)
        return output

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Record every kind of step as soon as it has run once: what a warm-up does."""
        patience, self.patience = self.patience, 1
        try:
            yield
        finally:
            self.patience = patience

    def follow(self, weights: Sequence[Tensor]) -> None:
        """Forget what was recorded over other weights than these: adapters were loaded, or a part was exchanged."""
        addresses = [weight.data_ptr() for weight in weights] if self.records else []
        if addresses != self._weights:
            self.forget()
            self._weights = addresses

    def forget(self) -> None:
        """Drop all recordings: what they read has moved."""
        self._replays.clear()
        self._seen.clear()
        self._pool = None  # PyTorch takes no new graph into a pool whose graphs are all gone

    def _is_steady(self, kind: Hashable) -> bool:
        self._seen[kind] = self._seen.pop(kind, 0) + 1
        if len(self._seen) > 4 * self.limit:
            self._seen.popitem(last=False)
        return self._seen[kind] >= self.patience

    def _recorded(self, step: Step, inputs: Sequence[Tensor]) -> Replay | None:
        assert self._record is not None, "asked only where steps are recorded"
        try:
            return self._record(step, inputs)
        except RuntimeError as error:  # a part that was put in from outside may read the device
            warnings.warn(f"this step cannot be recorded as a CUDA graph and stays slow: {error}", stacklevel=2)
            if not len(self):
                self._pool = None
            return None

    def _record_cuda(self, step: Step, inputs: Sequence[Tensor]) -> Replay:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return CudaReplay(step, inputs, self.device, self._pool, self._stream)
