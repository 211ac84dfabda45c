"""Two ways for one thread to hand things to another: the newest wins (`Latest`), or the producer waits (`Bounded`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from threading import Condition
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """Raised by `put` on a closed mailbox, and by `get` once it is closed and empty."""


class _Mailbox(Generic[T]):
    def __init__(self, size: int) -> None:
        self._items: deque[T] = deque(maxlen=size)
        self._changed = Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        """Every item until the mailbox is closed and empty."""
        while True:
            try:
                yield self.get()
            except Closed:
                return

    @property
    def closed(self) -> bool:
        return self._closed

    def get(self, timeout: float | None = None) -> T:
        """The oldest item, waiting for one at most `timeout` seconds (None: for ever).

        Raises:
            TimeoutError: nothing came in time.
            Closed: the mailbox is closed and everything in it was read.
        """
        with self._changed:
            ready = self._changed.wait_for(lambda: self._items or self._closed, timeout)
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            if ready:
                raise Closed("the mailbox is closed and empty")
            raise TimeoutError(f"nothing came within {timeout} s")

    def close(self) -> None:
        """End both sides: waiting producers get `Closed`, consumers too once the rest is read. Harmless twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Latest(_Mailbox[T]):
    """Holds the newest items, one by default; newer ones replace the oldest. For live input: the reader is never
    behind by more than that.

    Args:
        size: items that are kept; more than one for a reader that takes several in one go.

    Attributes:
        dropped: items that were replaced before anybody read them.
    """

    def __init__(self, size: int = 1) -> None:
        super().__init__(size)
        self.dropped = 0

    def put(self, item: T) -> None:
        """Never waits. Raises `Closed` after `close`."""
        with self._changed:
            if self._closed:
                raise Closed("the mailbox is closed; nobody will read this")
            self.dropped += len(self._items) == self._items.maxlen
            self._items.append(item)  # a full deque lets its oldest go
            self._changed.notify_all()


class Bounded(_Mailbox[T]):
    """Holds at most `size` items in order; a producer that is ahead waits. For output and sound: nothing is dropped."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a mailbox holds at least 1 item, got size {size}")
        super().__init__(size)
        self._size = size

    def put(self, item: T, timeout: float | None = None) -> None:
        """Waits for room at most `timeout` seconds (None: for ever).

        Raises:
            TimeoutError: no room in time; the item was not taken.
            Closed: the mailbox is, or was meanwhile, closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < self._size or self._closed, timeout)
            if self._closed:
                raise Closed("the mailbox is closed; nobody will read this")
            if len(self._items) == self._size:
                raise TimeoutError(f"no room within {timeout} s: the reader is behind by {self._size} items")
            self._items.append(item)
            self._changed.notify_all()
