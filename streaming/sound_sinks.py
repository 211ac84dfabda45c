"""Where sound goes: a WAV file that is complete at any moment, and the speaker of this machine."""

from __future__ import annotations

import os
import wave
from pathlib import Path
from types import TracebackType
from typing import Any

from .jitter import LEAD_SECONDS, JitterBuffer
from .types import Chunk

FULL_SCALE = 32767  # of 16-bit samples
AHEAD_SECONDS = 0.5  # of sound beyond the lead that `Speaker.write` takes before it waits
FAREWELL_SECONDS = 30.0  # a device that plays nothing for so long is gone


class WavFile:
    """A sink that writes sound chunks to a 16-bit PCM WAV file; video passes by.

    The header is brought up to date with every chunk, so that whatever has reached the disk is a complete file even if
    the process is interrupted or killed.

    Args:
        path: ends in .wav; an existing file is replaced at the first chunk.

    Attributes:
        samples, rate: written so far, and how many make a second (0 before the first).

    Raises:
        ValueError, FileNotFoundError, IsADirectoryError, PermissionError: now rather than after the first chunk.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        _check_writable(self.path)
        self.samples = self.rate = 0
        self._file: Any = None
        self._wave: wave.Wave_write | None = None
        self._shape = (0, 0)
        self._closed = False

    @property
    def seconds(self) -> float:
        return self.samples / self.rate if self.rate else 0.0

    def write(self, chunk: Chunk) -> None:
        """Record a chunk of sound [channels, samples] in [-1, 1]; louder is clipped.

        Raises:
            ValueError: the rate or the number of channels changes, or the file is closed.
        """
        if self._closed:
            raise ValueError(f"the recording {self.path} is closed")
        if chunk.kind != "audio":
            return
        shape = (chunk.data.shape[0], round(chunk.rate))
        if self._wave is None:
            self._open(*shape)
        elif shape != self._shape:
            raise ValueError(f"sound is now {shape[0]} x {shape[1]} Hz, the file began with {self._shape}")
        assert self._wave is not None
        pcm = chunk.data.detach().float().clamp(-1, 1).mul(FULL_SCALE).round().short()
        self._wave.writeframes(pcm.T.contiguous().cpu().numpy().astype("<i2").tobytes())
        self._file.flush()
        self.samples += chunk.data.shape[1]

    def _open(self, channels: int, rate: int) -> None:
        self._file = self.path.open("wb")
        writer = wave.open(self._file)  # noqa: SIM115  (open as long as the stream)
        writer.setparams((channels, 2, rate, 0, "NONE", ""))
        self._wave = writer
        self._shape, self.rate = (channels, rate), rate

    def close(self) -> None:
        """Finish the file; harmless twice. Without any sound there is no file."""
        self._closed = True
        if self._wave is not None:
            self._wave.close()
            self._file.close()
            self._wave = None

    def __enter__(self) -> WavFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_writable(path: Path) -> None:
    if path.suffix.lower() != ".wav":
        raise ValueError(f"sound is written to a .wav file, got {path.name!r}; name it {path.stem or 'out'}.wav")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no directory {path.parent}")
    existed = path.exists()
    try:
        path.open("ab").close()  # permission bits do not tell: root, read-only disks and quotas differ from them
    except OSError as error:
        raise PermissionError(f"cannot write {path}: {error.strerror}") from None
    if not existed:
        path.unlink()


class Speaker:
    """A sink that plays sound on this machine's speaker; video passes by. `paces` tells `live` that it is the clock.

    `write` waits while enough sound is ahead, so the speaker is the clock of the stream that feeds it.

    Args:
        lead: seconds of sound that are gathered before the first is heard.

    Raises:
        ImportError: sounddevice or its PortAudio library is missing. OSError: there is no speaker.
    """

    paces = True

    def __init__(self, *, lead: float = LEAD_SECONDS) -> None:
        self.lead = lead
        self._devices = _sounddevice()
        self._buffer: JitterBuffer | None = None
        self._stream: Any = None

    @property
    def underruns(self) -> int:
        """Gaps that were heard so far."""
        return 0 if self._buffer is None else self._buffer.underruns

    @property
    def position(self) -> float:
        """Seconds of the stream that were heard: what video beside it is shown by."""
        return 0.0 if self._buffer is None else self._buffer.position

    def write(self, chunk: Chunk) -> None:
        if chunk.kind != "audio":
            return
        if self._buffer is None:
            self._buffer = JitterBuffer(
                chunk.rate, channels=chunk.data.shape[0], lead=self.lead, capacity=self.lead + AHEAD_SECONDS
            )
            self._stream = self._open(self._buffer)
        self._buffer.write(chunk.data, FAREWELL_SECONDS)

    def _open(self, buffer: JitterBuffer) -> Any:
        def play(out: Any, frames: int, time: Any, status: Any) -> None:
            out[:] = buffer.read(frames).T.numpy()

        try:
            stream = self._devices.OutputStream(
                samplerate=buffer.rate, channels=buffer.channels, dtype="float32", callback=play
            )
            stream.start()
        except self._devices.PortAudioError as error:
            raise OSError(f"the speaker cannot be opened ({' '.join(str(error).split())})") from None
        return stream

    def close(self) -> None:
        """Play what waits, then let the device go; harmless twice."""
        if self._buffer is None or self._stream is None:
            return
        stream, self._stream = self._stream, None
        try:
            self._buffer.finish()
            self._buffer.wait_drained(FAREWELL_SECONDS)
            stream.stop()  # waits until the device has played its own buffers
        finally:
            self._buffer.close()
            stream.close()


def _sounddevice() -> Any:
    try:
        import sounddevice
    except ImportError:
        raise ImportError('a speaker needs sounddevice: pip install "millstream[speaker]"') from None
    except OSError:
        raise ImportError(
            "sounddevice does not find the PortAudio library: on Debian apt-get install libportaudio2"
        ) from None
    try:
        sounddevice.query_devices(kind="output")
    except (sounddevice.PortAudioError, ValueError):
        raise OSError("this machine has no speaker; write a file instead, for example -o out.wav") from None
    return sounddevice
