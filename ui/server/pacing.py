"""How fast a client may be sent pictures, and how good: both learnt from its acknowledgements."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

LEAST_IN_FLIGHT, MOST_IN_FLIGHT = 2, 8
LEAST_QUALITY, FIRST_QUALITY, MOST_QUALITY = 35, 80, 90
SLOW_SECONDS, QUICK_SECONDS = 0.06, 0.02  # of waiting on the way, above the quickest round trip
ADJUST_SECONDS = 0.25
LOST_SECONDS = 1.0  # an acknowledgement that hasn't come by then never will: the page is hidden, or the frame was lost
MUTE_SECONDS = 0.1  # a client that never acknowledges anything gets ten pictures a second


class Flow:
    """Acknowledgements of one client.

    As many pictures are under way as one round trip holds, at least two: fewer would leave a distant client waiting,
    more would only grow old in its network's buffers (as in BBR, Cardwell et al. 2016). Quality falls when pictures
    wait on the way and slowly rises again when they don't.

    Attributes:
        quality: of the next picture, for JPEG and WebP alike.
        acknowledged: pictures that the client has shown.
    """

    def __init__(self, rate: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.quality = FIRST_QUALITY
        self.acknowledged = 0
        self._rate = rate
        self._clock = clock
        self._sent: deque[tuple[int, float]] = deque(maxlen=64)
        self._quickest = math.inf  # never forgotten: a queue that lasts must not pass for distance
        self._adjusted = 0.0

    @property
    def limit(self) -> int:
        """Pictures that may be under way now."""
        if math.isinf(self._quickest):
            return LEAST_IN_FLIGHT
        return max(LEAST_IN_FLIGHT, min(MOST_IN_FLIGHT, 1 + round(self._quickest * self._rate)))

    def wait(self) -> float:
        """Seconds until another picture may be sent if no acknowledgement comes; 0 is now."""
        now = self._clock()
        patience = LOST_SECONDS if self.acknowledged else MUTE_SECONDS
        while self._sent and now - self._sent[0][1] >= patience:
            self._sent.popleft()
        if len(self._sent) < self.limit:
            return 0.0
        return self._sent[0][1] + patience - now

    def sent(self, frame: int) -> None:
        self._sent.append((frame, self._clock()))

    def shown(self, frame: int) -> None:
        """The client has shown `frame`, and with it every earlier one. Frames that were never sent change nothing."""
        now = self._clock()
        while self._sent and self._sent[0][0] <= frame:
            number, start = self._sent.popleft()
            if number == frame:
                self.acknowledged += 1
                self._learn(now, now - start)

    def _learn(self, now: float, trip: float) -> None:
        self._quickest = min(self._quickest, trip)
        if now - self._adjusted < ADJUST_SECONDS:
            return
        waiting = trip - self._quickest
        if waiting > SLOW_SECONDS:
            self.quality = max(LEAST_QUALITY, round(self.quality * 0.85))
            self._adjusted = now
        elif waiting < QUICK_SECONDS and self.quality < MOST_QUALITY:
            self.quality += 1
            self._adjusted = now


class Bucket:
    """A rate limit: `burst` at once, `per_second` for ever (a token bucket)."""

    def __init__(self, per_second: float, burst: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._left, self._when = float(burst), clock()

    def take(self, amount: float = 1) -> bool:
        """Is so much left? Then it is taken."""
        self._fill()
        if self._left < amount:
            return False
        self._left -= amount
        return True

    @property
    def empty(self) -> bool:
        """Is there none left now?"""
        self._fill()
        return self._left < 1

    def _fill(self) -> None:
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._when) * self._per_second)
        self._when = now
