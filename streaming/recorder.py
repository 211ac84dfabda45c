"""Recording a stream to an mp4 that plays even if the process dies in the middle.

Every frame is a movie fragment of its own (ISO/IEC 14496-12, about a hundred bytes each), so whatever has reached the
disk is a complete video, even of a model that draws slowly. Encoding is ffmpeg's, in its own process; a thread feeds
it, so the loop that draws is not held.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from threading import Thread
from types import TracebackType

from torch.nn.functional import pad

from .mailbox import Bounded, Closed
from .pixels import as_bytes, on_host
from .types import Chunk

KEYFRAME_SECONDS = 1.0  # how finely a player can seek
WAITING_BYTES = 64 * 2**20  # frames that may wait for the encoder before `write` does


class Recorder:
    """A sink that writes video chunks to an H.264 mp4 (yuv420p).

    Args:
        path: ends in .mp4; an existing file is replaced at the first frame.
        rate: frames per second of the file.
        scale: whole number of times each pixel is repeated each way, so that small worlds stay crisp.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError, ValueError: now rather than after the first frame.
        ImportError: imageio-ffmpeg is missing.
    """

    def __init__(self, path: str | os.PathLike[str], *, rate: float, scale: int = 1) -> None:
        self.path = Path(path)
        if not (isinstance(rate, (int, float)) and math.isfinite(rate) and rate > 0):
            raise ValueError(f"rate must be a positive number of frames per second, got {rate!r}")
        if not isinstance(scale, int) or scale < 1:
            raise ValueError(f"scale must be a whole number from 1, got {scale!r}")
        _check_writable(self.path)
        _ffmpeg()
        self.rate, self.scale = rate, scale
        self.frames = 0
        self._size: tuple[int, int] | None = None
        self._waiting: Bounded[bytes] | None = None
        self._feeder: Thread | None = None
        self._error: Exception | None = None
        self._closed = False

    def write(self, chunk: Chunk) -> None:
        """Record a video chunk [T, 3, H, W] in [0, 1]. Waits only if the encoder is far behind.

        Raises:
            ValueError: the chunk is sound, of another size than the first, or the recorder is closed.
            OSError: the encoder has failed, for example because the disk is full.
        """
        if self._closed:
            raise ValueError(f"the recording {self.path} is closed")
        if chunk.kind != "video":
            raise ValueError(f"a Recorder takes video, got a chunk of {chunk.kind}")
        height, width = chunk.data.shape[-2:]
        if self._size is None:
            self._start(height, width)
        elif self._size != (height, width):
            raise ValueError(f"frames are {height}x{width}, the recording began with {self._size[0]}x{self._size[1]}")
        # yuv420p halves the colour planes, so both sides must be even: an odd one repeats its last row or column
        even = pad(
            chunk.data.detach().float(), (0, width * self.scale % 2, 0, height * self.scale % 2), mode="replicate"
        )
        frames_THWC = on_host(as_bytes(even).permute(0, 2, 3, 1)).numpy()
        for frame in frames_THWC:
            self._hand_over(frame.tobytes())

    def _start(self, height: int, width: int) -> None:
        self._size = (height, width)
        self._waiting = Bounded(max(8, WAITING_BYTES // (3 * height * width)))
        self._feeder = Thread(target=self._feed, args=(self._waiting,), name="millstream-recorder", daemon=True)
        self._feeder.start()

    def _hand_over(self, frame: bytes) -> None:
        assert self._waiting is not None
        try:
            self._waiting.put(frame)
        except Closed:
            raise self._failure() from self._error
        self.frames += 1

    def _feed(self, waiting: Bounded[bytes]) -> None:
        try:
            self._encode(waiting)
        except Exception as error:
            self._error = error
        finally:
            waiting.close()

    def _encode(self, waiting: Bounded[bytes]) -> None:
        assert self._size is not None
        height, width = (side + side * self.scale % 2 for side in self._size)
        writer = _ffmpeg().write_frames(
            str(self.path),
            (width, height),
            fps=self.rate,  # pyright: ignore[reportArgumentType]  (its default of 16 reads as int)
            codec="libx264",
            quality=6,
            macro_block_size=1,
            ffmpeg_log_level="error",
            output_params=_output_options(self.rate, self.scale),
        )
        writer.send(None)
        try:
            for frame in waiting:
                writer.send(frame)
        finally:
            writer.close()

    def _failure(self) -> OSError:
        return OSError(f"recording to {self.path} has stopped: is the disk full? ({str(self._error).splitlines()[0]})")

    def close(self) -> None:
        """Write what is waiting and finish the file; harmless twice. Without any frame there is no file.

        Raises:
            OSError: the encoder has failed since the last `write`.
        """
        if self._closed:
            return
        self._closed = True
        if self._waiting is None or self._feeder is None:
            return
        self._waiting.close()
        self._feeder.join()
        if self._error is not None:
            raise self._failure() from self._error

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _output_options(rate: float, scale: int) -> list[str]:
    fragments = "+frag_keyframe+frag_every_frame+empty_moov+default_base_moof"
    return [
        *("-vf", f"scale=iw*{scale}:ih*{scale}:flags=neighbor"),  # here, so that the pipe carries small frames
        *("-preset", "ultrafast", "-tune", "zerolatency", "-threads", "1"),
        *("-g", str(max(1, int(rate * KEYFRAME_SECONDS))), "-movflags", fragments, "-flush_packets", "1"),
    ]


def _check_writable(path: Path) -> None:
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"a recording is an .mp4 file, got {path.name!r}; name it {path.stem}.mp4")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot record to {path}: there is no directory {path.parent}")
    existed = path.exists()
    try:
        path.open("ab").close()  # permission bits do not tell: root, read-only disks and quotas differ from them
    except OSError as error:
        raise PermissionError(f"cannot record to {path}: {error.strerror}") from None
    if not existed:
        path.unlink()


def _ffmpeg():
    try:
        import imageio_ffmpeg
    except ImportError:
        raise ImportError("recording needs imageio-ffmpeg: pip install imageio-ffmpeg") from None
    return imageio_ffmpeg
