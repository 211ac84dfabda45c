"""A window on the stream: shows chunks as they are made and hears the keyboard. OpenCV, imported when one is opened."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from .keys import HeldKeys

if TYPE_CHECKING:
    import numpy as np

    from ..streaming import Chunk

# What OpenCV reports for the arrow keys, by window system; see cv2.waitKeyEx.
_SPECIAL = {
    **{0xFF51: "ArrowLeft", 0xFF52: "ArrowUp", 0xFF53: "ArrowRight", 0xFF54: "ArrowDown"},  # GTK, Qt on X11
    **{0x250000: "ArrowLeft", 0x260000: "ArrowUp", 0x270000: "ArrowRight", 0x280000: "ArrowDown"},  # Windows
    **{0xF702: "ArrowLeft", 0xF700: "ArrowUp", 0xF703: "ArrowRight", 0xF701: "ArrowDown"},  # macOS
    **{27: "Escape", 32: "Space", 10: "Enter", 13: "Enter"},
}
_MIN_HEIGHT = 480
_PROBE_SECONDS = 30
_PROBE = "import cv2; cv2.namedWindow('probe'); cv2.destroyAllWindows()"


class Window:
    """A `Sink` for video that also says which keys are down. Use it from one thread, the one that made it.

    `millstream.live(source, session, Window())` runs until the user closes it.

    Args:
        title: of the window.
        scale: whole number of screen pixels per pixel of video; by default as many as make it 480 high or more.
        hold: seconds for which a key press counts as held (OpenCV reports repeats, never that a key went up).

    Attributes:
        closed: True once the user pressed Escape or closed the window.
        caption: text drawn below frames per second and frame age, for example the control that is applied.

    Raises:
        ImportError: OpenCV is missing or can't load its libraries.
        OSError: there is no screen.
        ValueError: `scale` below 1 or `hold` not above 0.
    """

    def __init__(self, title: str = "millstream", *, scale: int | None = None, hold: float = 0.3) -> None:
        if scale is not None and scale < 1:
            raise ValueError(f"scale must be 1 or more, got {scale}")
        if hold <= 0:
            raise ValueError(f"hold must be more than 0 seconds, got {hold}")
        self._cv2 = _opencv()
        _require_screen()
        self.title = title
        self.scale = scale
        self.caption = ""
        self.closed = False
        self._held = HeldKeys(hold)
        self._presses: deque[str] = deque()
        self._shown: deque[float] = deque(maxlen=32)
        self._due = 0.0
        self._cv2.namedWindow(title, self._cv2.WINDOW_AUTOSIZE | self._cv2.WINDOW_GUI_NORMAL)  # without a toolbar

    @property
    def keys(self) -> frozenset[str]:
        """Codes of the keys that are down now, such as "KeyW" and "ArrowLeft"."""
        return self._held.held(time.monotonic())

    def presses(self) -> list[str]:
        """Codes pressed since the last call, oldest first. A key that is held down is there once."""
        pressed = list(self._presses)
        self._presses.clear()
        return pressed

    def write(self, chunk: Chunk) -> None:
        """Show `chunk`'s frames at its rate; a late frame is shown at once, and those after it keep their distance.

        Late is also what was captured before the last frame was shown: a camera faster than the rate must not wait.

        Raises:
            EndOfStream: the user has closed the window.
        """
        from ..streaming.pixels import as_bytes
        from ..streaming.types import EndOfStream

        if self.closed:
            raise EndOfStream("the window was closed")
        if chunk.kind != "video":
            return
        if self._shown and chunk.time < self._shown[-1]:
            self._due = 0.0
        for frame in chunk.data:
            self._wait(self._due - time.monotonic())
            now = time.monotonic()
            self._due = max(self._due, now) + 1.0 / chunk.rate
            self._shown.append(now)
            picture = as_bytes(frame).permute(1, 2, 0).cpu().numpy()
            self._cv2.imshow(self.title, self._draw(picture, now - chunk.time))
            self._wait(0.0)
            if self.closed:
                return

    def close(self) -> None:
        """Take the window down. Harmless when called twice."""
        if not self.closed or self._is_visible():
            self._cv2.destroyWindow(self.title)
        self.closed = True

    def _wait(self, seconds: float) -> None:
        """Let the window live for `seconds` or a moment, hearing every key; without this OpenCV draws nothing."""
        end = time.monotonic() + seconds
        while not self.closed:
            code = self._cv2.waitKeyEx(max(1, int((end - time.monotonic()) * 1000)))
            key = key_name(code)
            if key is not None:
                now = time.monotonic()
                if key not in self._held.held(now):
                    self._presses.append(key)
                self._held.press(key, now)
            self.closed = key == "Escape" or not self._is_visible()
            # Keys repeat faster than a slow model draws: go on until the queue is empty, or it would grow.
            if code < 0 and time.monotonic() >= end:
                return

    def _is_visible(self) -> bool:
        try:
            return self._cv2.getWindowProperty(self.title, self._cv2.WND_PROP_VISIBLE) >= 1
        except self._cv2.error:  # Qt has already forgotten a window that the user closed
            return False

    def _draw(self, picture: np.ndarray, age: float) -> np.ndarray:
        """The frame enlarged, BGR, with the overlay."""
        cv2 = self._cv2
        scale = self.scale or max(1, -(-_MIN_HEIGHT // picture.shape[0]))
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
        span = self._shown[-1] - self._shown[0]
        rate = (len(self._shown) - 1) / span if span > 0 else 0.0
        for row, text in enumerate((f"{rate:.1f} frames/s   age {1000 * age:.0f} ms", self.caption)):
            for thickness, colour in ((3, (0, 0, 0)), (1, (255, 255, 255))):
                cv2.putText(
                    picture, text, (8, 20 + 20 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, thickness, cv2.LINE_AA
                )
        return picture


def key_name(code: int) -> str | None:
    """The W3C name of what `cv2.waitKeyEx` returned; None for no key or one that has no use here."""
    if code < 0:
        return None
    if code in _SPECIAL:
        return _SPECIAL[code]
    code &= 0xFFFF  # GTK puts Num Lock and the shift keys above
    if code in _SPECIAL:
        return _SPECIAL[code]
    character = chr(code).upper()
    if "A" <= character <= "Z":
        return f"Key{character}"
    return f"Digit{character}" if "0" <= character <= "9" else None


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            f"a window needs OpenCV, which can't be loaded ({error}): pip install opencv-python, "
            "and on Debian or Ubuntu apt-get install libgl1"
        ) from error
    return cv2


def _require_screen() -> None:
    """Refuse a machine without a screen. Qt ends the process that finds none, so another process asks first."""
    advice = "on a headless machine, write a file instead: millstream run PROMPT or live --video FILE, with -o OUT.mp4"
    if sys.platform != "linux":
        return
    if not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
        raise OSError(f"no screen to open a window on (DISPLAY is not set); {advice}")
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, timeout=_PROBE_SECONDS, check=False)
    if probe.returncode != 0:
        raise OSError(f"no window can be opened on screen {os.environ.get('DISPLAY') or 'of Wayland'}; {advice}")
