"""Where live pictures come from, and how large they are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from ..streaming import Chunk, EndOfStream, ImageControl, Session, fit


class SourceSession(Session[Any, ImageControl]):
    """A session that takes its pictures from a source.

    Args:
        pipeline: with a `size`.
        source: anything with `read`, see `Source`; closed with the session.

    Raises:
        TypeError: no source.
    """

    def __init__(self, pipeline: Any, control: ImageControl, *, generator: Any, source: Any) -> None:
        if not hasattr(source, "read"):
            raise TypeError(
                f"a source is a Camera, a VideoFile or the like, with read(); got a {type(source).__name__}"
            )
        super().__init__(pipeline, control, generator=generator)
        self.source = source

    def chunks(self) -> Iterator[Chunk]:
        """Chunks as they are drawn, until the source ends, and then those still under way; or until it is closed."""
        pipeline: Any = self.pipeline
        while self._finalizer.alive:
            try:
                frame = self.source.read()
            except EndOfStream:
                yield from self.flush()
                return
            if frame is None:
                time.sleep(0.001)
            else:
                yield from self.step(frame._replace(data=fit(frame.data, pipeline.size)))

    def fork(self) -> Session[Any, ImageControl]:
        """Refused, since two cannot read one source."""
        raise ValueError(
            "two sessions cannot read one source; open another with stream(prompt), restore(session.snapshot()) there "
            "and give it pictures with step"
        )

    def close(self) -> None:
        """Give the pipeline back what the session holds, and close the source."""
        super().close()
        close = getattr(self.source, "close", None)
        if close is not None:
            close()


def size_of(pipe: Any) -> tuple[int, int]:
    """What a pipeline draws unless it is told otherwise."""
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    side = getattr(getattr(network, "config", None), "sample_size", None) or getattr(pipe, "default_sample_size", 64)
    high, wide = (side, side) if isinstance(side, int) else side
    scale = getattr(pipe, "vae_scale_factor", 8)
    return high * scale, wide * scale
