"""The recent past of a stream, as snapshots in a fixed amount of memory."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from torch import Tensor

from ...streaming import Snapshot

EVERY_SECONDS = 1.0


def parked(snapshot: Snapshot) -> Snapshot:
    """`snapshot` in main memory, so that waiting costs the accelerator nothing."""
    leaves = {name: leaf.cpu() if isinstance(leaf, Tensor) else leaf for name, leaf in snapshot.leaves.items()}
    return replace(snapshot, leaves=leaves)


def size_of(snapshot: Snapshot) -> int:
    """Bytes of its tensors."""
    return sum(leaf.nbytes for leaf in snapshot.leaves.values() if isinstance(leaf, Tensor))


class History:
    """A snapshot of every second that was drawn, for the last `seconds`, in at most `limit` bytes."""

    def __init__(self, seconds: float, limit: int) -> None:
        self.seconds, self.limit = seconds, limit
        self.too_large = 0  # bytes of a snapshot that alone is over the limit
        self._moments: deque[tuple[float, Snapshot]] = deque()
        self._bytes = 0

    def due(self, position: float) -> bool:
        """Is it time for another? `position` is in seconds of the stream."""
        if self.too_large or not self.seconds:
            return False
        return not self._moments or position - self._moments[-1][0] >= EVERY_SECONDS

    def add(self, position: float, snapshot: Snapshot) -> None:
        size = size_of(snapshot)
        if size > self.limit:
            self.too_large = size
            return
        self._moments.append((position, snapshot))
        self._bytes += size
        while self._bytes > self.limit or position - self._moments[0][0] > self.seconds + EVERY_SECONDS:
            self._bytes -= size_of(self._moments.popleft()[1])

    def before(self, position: float) -> tuple[float, Snapshot]:
        """The newest moment not after `position`, or else the oldest there is. What came later is forgotten.

        Raises:
            ValueError: nothing is remembered.
        """
        if not self._moments:
            why = "this stream has just begun"
            if self.too_large:
                why = f"a moment of this model takes {self.too_large:,} bytes and {self.limit:,} may be used"
            raise ValueError(f"there is no way back: {why}")
        while len(self._moments) > 1 and self._moments[-1][0] > position:
            self._bytes -= size_of(self._moments.pop()[1])
        return self._moments[-1]

    def clear(self) -> None:
        self._moments.clear()
        self._bytes = 0
