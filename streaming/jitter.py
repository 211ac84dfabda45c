"""Sound that waits to be played: filled in chunks by whoever makes it, emptied in blocks by whoever plays it."""

from __future__ import annotations

import math
from threading import Condition

import torch
from torch import Tensor

from .mailbox import Closed

LEAD_SECONDS = 0.12  # heard late by this much, a stream may stumble by as much without a gap
CAPACITY_SECONDS = 2.0  # of sound made ahead; whoever makes more waits, since nothing is ever dropped


class JitterBuffer:
    """First in, first out, and the clock of whatever is shown beside the sound.

    Playing begins once `lead` seconds wait. A block that finds less than it needs is filled up with silence, which is
    an underrun; playing then rests until `lead` seconds wait again, since one gap is heard less than many.

    Args:
        rate: samples per second.
        channels: of every chunk and block.
        lead, capacity: seconds; capacity is at least lead.

    Attributes:
        underruns: gaps so far.
        silence: samples of silence that filled them.
        played: samples of the stream that were played: the master clock, which stands still in a gap.
    """

    def __init__(
        self, rate: float, *, channels: int = 1, lead: float = LEAD_SECONDS, capacity: float = CAPACITY_SECONDS
    ) -> None:
        if not 0 <= lead <= capacity or not math.isfinite(capacity) or capacity <= 0:
            raise ValueError(f"lead must lie between 0 and capacity seconds, got lead {lead} and capacity {capacity}")
        self.rate, self.channels = rate, channels
        self.lead, self.capacity = round(lead * rate), max(1, round(capacity * rate))
        self.underruns = self.silence = self.played = 0
        self._ring = torch.zeros(channels, self.capacity)
        self._waiting = 0
        self._playing = self._finished = self._closed = False
        self._changed = Condition()

    def __len__(self) -> int:
        """Samples that wait."""
        return self._waiting

    @property
    def position(self) -> float:
        """Seconds of the stream that were played."""
        return self.played / self.rate

    @property
    def drained(self) -> bool:
        """Everything was played and nothing will come."""
        return self._finished and not self._waiting

    def write(self, samples: Tensor, timeout: float | None = None) -> None:
        """Add [channels, n], waiting for room at most `timeout` seconds (None: for ever) for each part of it.

        Raises:
            ValueError: another number of channels.
            TimeoutError: nobody plays; the part that fitted was taken.
            Closed: the buffer is, or was meanwhile, closed.
        """
        if samples.ndim != 2 or samples.shape[0] != self.channels:
            raise ValueError(f"sound is [{self.channels}, samples] here, got {list(samples.shape)}")
        rest = samples.detach().to("cpu", torch.float32)
        while rest.shape[1]:
            with self._changed:
                has_room = self._changed.wait_for(lambda: self._waiting < self.capacity or self._closed, timeout)
                if self._closed:
                    raise Closed("the buffer is closed; nobody will play this")
                if not has_room:
                    raise TimeoutError(f"nobody played anything within {timeout} s")
                count = min(rest.shape[1], self.capacity - self._waiting)
                self._put(rest[:, :count])
                rest = rest[:, count:]

    def _put(self, samples: Tensor) -> None:
        count, end = samples.shape[1], (self.played + self._waiting) % self.capacity
        first = min(count, self.capacity - end)
        self._ring[:, end : end + first] = samples[:, :first]
        self._ring[:, : count - first] = samples[:, first:]
        self._waiting += count

    def read(self, count: int) -> Tensor:
        """What is played next, [channels, count]. Never waits: it is called by the device."""
        block = torch.zeros(self.channels, count)
        with self._changed:
            if not self._playing and (self._waiting >= max(1, self.lead) or self._finished):
                self._playing = True
            if not self._playing:
                return block
            got = min(count, self._waiting)
            start = self.played % self.capacity
            first = min(got, self.capacity - start)
            block[:, :first] = self._ring[:, start : start + first]
            block[:, first:got] = self._ring[:, : got - first]
            self.played += got
            self._waiting -= got
            if got < count and not self._finished:
                self.underruns += 1
                self.silence += count - got
                self._playing = False
            self._changed.notify_all()
        return block

    def finish(self) -> None:
        """Nothing will come: what waits is played without its lead, and the end is no underrun."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def wait_drained(self, timeout: float | None = None) -> bool:
        """Wait until everything was played, or the buffer is closed; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.drained or self._closed, timeout)

    def close(self) -> None:
        """End both sides; what waits is not played."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Playout:
    """When a listener would have heard a gap, told from the times of delivery alone: an ideal device by arithmetic.

    The listener begins `lead` seconds after the first sound came. Sound that comes after everything before it was heard
    is an underrun, and the listener gathers `lead` seconds again.
    """

    def __init__(self, lead: float = LEAD_SECONDS) -> None:
        self.lead = lead
        self.underruns = 0
        self._heard: float | None = None  # when the sound that was delivered so far will have been heard

    def arrived(self, now: float, seconds: float) -> None:
        """`seconds` of sound came at `now`."""
        if self._heard is None:
            self._heard = now + self.lead
        elif now > self._heard:
            self.underruns += 1
            self._heard = now + self.lead
        self._heard += seconds

    def paused(self) -> None:
        """What was to be said is said: the silence that follows is meant."""
        self._heard = None
