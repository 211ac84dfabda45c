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
        source: anything with `read`, see `Source`.
    """

    def __init__(self, pipeline: Any, control: ImageControl, *, generator: Any, source: Any) -> None:
        super().__init__(pipeline, control, generator=generator)
        self.source = source

    def chunks(self) -> Iterator[Chunk]:
        """Chunks as they are drawn, until the source ends; then those that were still under way."""
        pipeline: Any = self.pipeline
        while True:
            try:
                frame = self.source.read()
            except EndOfStream:
                break
            if frame is None:
                time.sleep(0.001)
            else:
                yield from self.step(frame._replace(data=fit(frame.data, pipeline.size)))
        yield from self.flush()


def size_of(pipe: Any) -> tuple[int, int]:
    """What a pipeline draws unless it is told otherwise."""
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    side = getattr(getattr(network, "config", None), "sample_size", None) or getattr(pipe, "default_sample_size", 64)
    high, wide = (side, side) if isinstance(side, int) else side
    scale = getattr(pipe, "vae_scale_factor", 8)
    return high * scale, wide * scale
