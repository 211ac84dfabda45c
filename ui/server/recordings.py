"""Recordings: a folder per session, a quota, and ids that nobody can guess. No name from a client becomes a path."""

from __future__ import annotations

import errno
import logging
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock, Thread

from ...streaming import Bounded, Chunk, Closed, Recorder
from .security import same

log = logging.getLogger(__name__)
FREE_BYTES = 2**28  # that recordings leave on the disk
WAITING_CHUNKS = 32
LARGE_ENOUGH = 384  # pixels of height; smaller frames are enlarged by whole numbers, since players blur a thumbnail
KEEP_SECONDS = 600.0  # how long the recordings of a session that has ended can still be fetched
MOST_REPEATED = 64  # frames that fill a gap of a live picture; a longer one is cut short


class Recording:
    """One file. Chunks are handed over on the engine's thread and written on this recording's own, so a slow disk
    ends the recording and not the stream.

    Args:
        id: names the file and is all that a client ever learns of it.
        path: the file.
        rate: frames per second of the file.
        live: the chunks come when they come (a camera's), so frames are repeated or left out to keep real time.
        allowance: bytes it may have; asked often, since other recordings grow too.
    """

    def __init__(self, id: str, path: Path, *, rate: float, live: bool, allowance: Callable[[], int]) -> None:
        self.id, self.path, self.rate, self.live = id, path, rate, live
        self.stopped = ""  # why it ended before anybody asked
        self.frames = 0
        self._allowance = allowance
        self._began: float | None = None
        self._chunks: Bounded[tuple[float, Chunk]] = Bounded(WAITING_CHUNKS)
        self._thread = Thread(target=self._write_all, name="millstream-recording", daemon=True)
        self._thread.start()

    @property
    def finished(self) -> bool:
        return not self._thread.is_alive() and self.frames > 0

    @property
    def bytes(self) -> int:
        """Of the file; 0 where there is none, or none that can be seen."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    @property
    def seconds(self) -> float:
        return self.frames / self.rate

    def write(self, chunk: Chunk) -> None:
        """Never waits: if the disk is too slow the recording ends here and `stopped` says so."""
        if chunk.kind != "video" or self._chunks.closed:
            return
        try:
            self._chunks.put((time.monotonic(), chunk), timeout=0)
        except TimeoutError:
            self._stop("the disk is too slow")
        except Closed:
            pass

    def finish(self) -> None:
        """Close the file; it plays from now on. Waits for what was handed over; harmless twice."""
        self._chunks.close()
        self._thread.join()

    def _stop(self, why: str) -> None:
        self.stopped = self.stopped or why
        self._chunks.close()

    def _write_all(self) -> None:
        recorder: Recorder | None = None
        try:
            for when, chunk in self._chunks:
                if recorder is None:
                    height = chunk.data.shape[-2]
                    recorder = Recorder(self.path, rate=self.rate, scale=max(1, round(LARGE_ENOUGH / height)))
                for _ in range(self._copies(when, chunk)):
                    recorder.write(chunk)
                self.frames = recorder.frames
                if self.bytes > self._allowance():
                    self._stop("the recordings have reached their quota")
                    break
        except Exception as error:
            self._fail(error)
        finally:
            self._close(recorder)

    def _copies(self, when: float, chunk: Chunk) -> int:
        """How often a chunk is written: once, but a live picture as often as its time on the screen asks for."""
        if not self.live:
            return 1
        self._began = when if self._began is None else self._began
        due = round((when - self._began) * self.rate) + len(chunk.data)
        return min(MOST_REPEATED, max(0, due - self.frames) // len(chunk.data))

    def _close(self, recorder: Recorder | None) -> None:
        if recorder is None:
            return
        try:
            recorder.close()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        log.warning("a recording has ended: %s", error)
        self._stop(reason(error))


def reason(error: Exception) -> str:
    """Why a recording can't go on, in words that tell a client nothing of the server's folders."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the server's disk is full"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) or isinstance(error, PermissionError):
        return "the server may not write recordings"
    return "the server can't write recordings"


class Recordings:
    """All recordings of a server.

    Args:
        root: a folder that keeps them; None makes a temporary one, which `close` deletes.
        per_session, total: quotas in bytes. The total holds whoever has left, for what a kept folder held before, too.
    """

    def __init__(self, root: Path | None, per_session: int, total: int) -> None:
        self._temporary = root is None
        self.root = Path(tempfile.mkdtemp(prefix="millstream-")) if root is None else root
        self.per_session, self.total = per_session, total
        self._of: dict[str, list[Recording]] = {}  # by session
        self._keys: dict[str, str] = {}
        self._leaving: dict[str, float] = {}
        # bytes of files that stay after their session is forgotten
        self._kept = 0 if self._temporary else sum(path.stat().st_size for path in self.root.rglob("*.mp4"))
        self._lock = Lock()

    def begin(self, owner: str, key: str, *, rate: float, live: bool) -> Recording:
        """A new recording of session `owner` (the server's own name for it); who shows `key` may fetch it.

        Raises:
            ValueError: a quota is used up, or the folder can't be written.
        """
        while self._left(owner) <= 0 and self._forget_oldest():
            pass
        if self._left(owner) <= 0:
            raise ValueError("the recordings have reached their quota; download them and begin a new session")
        folder = self.root / owner
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning("no recording can begin: %s", error)
            raise ValueError(f"nothing is recorded: {reason(error)}") from None
        id = secrets.token_urlsafe(16)
        recording = Recording(
            id, folder / f"{id}.mp4", rate=rate, live=live, allowance=lambda: recording.bytes + self._left(owner)
        )
        with self._lock:
            self._of.setdefault(owner, []).append(recording)
            self._keys[owner] = key
        return recording

    def _left(self, owner: str) -> int:
        with self._lock:
            sizes = {name: sum(each.bytes for each in group) for name, group in self._of.items()}
            used = self._kept + sum(sizes.values())
        return min(self.per_session - sizes.get(owner, 0), self.total - used, self._free() - FREE_BYTES)

    def _free(self) -> int:
        """Bytes left on the disk; as many as may be where nobody can tell, since writing will."""
        try:
            return shutil.disk_usage(self.root).free
        except OSError:
            return self.total + FREE_BYTES

    def _forget_oldest(self) -> bool:
        """Make room: those of the session that ended first go before their time. Is there such a session?"""
        with self._lock:
            oldest = min(self._leaving, key=lambda owner: self._leaving[owner], default=None)
            if oldest is None or not self._temporary:
                return False
            self._leaving[oldest] = 0.0
        self.sweep()
        return True

    def fetch(self, id: str, key: str) -> Path | None:
        """The finished file `id` for who knows its session's key. Ids are compared with those that were made, and
        never joined to a path."""
        with self._lock:
            for owner, group in self._of.items():
                for recording in group:
                    if same(recording.id, id) and same(self._keys[owner], key):
                        return recording.path if recording.finished and recording.bytes else None
        return None

    def leave(self, owner: str) -> None:
        """The session has ended; its recordings stay a while."""
        with self._lock:
            if owner in self._of:
                self._leaving[owner] = time.monotonic() + KEEP_SECONDS

    def sweep(self) -> None:
        """Delete what has stayed long enough. A folder that keeps recordings keeps its files."""
        with self._lock:
            gone = [owner for owner, until in self._leaving.items() if until < time.monotonic()]
            for owner in gone:
                self._kept += 0 if self._temporary else sum(recording.bytes for recording in self._of[owner])
                del self._leaving[owner], self._of[owner], self._keys[owner]
        for owner in gone if self._temporary else ():
            shutil.rmtree(self.root / owner, ignore_errors=True)

    def close(self) -> None:
        """Finish every file; a temporary folder is deleted."""
        with self._lock:
            recordings = [recording for group in self._of.values() for recording in group]
        for recording in recordings:
            recording.finish()
        if self._temporary:
            shutil.rmtree(self.root, ignore_errors=True)
