"""Video models that are played, at the command line: which models are, and how a key script steers their chunks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .keys import KeyScript

if TYPE_CHECKING:
    from ..pipelines.video import VideoPipeline
    from ..streaming import Session


def is_played(arguments: argparse.Namespace) -> bool:
    """Do these arguments mean a video model that hears keys, by the headers of its files? Nothing is fetched to tell.

    Raises:
        FileNotFoundError, ValueError: the weights can't be read.
    """
    from ..models.checkpoints import open_checkpoint
    from ..pipelines.video_load import find_parts

    weights, folder = arguments.checkpoint, Path(arguments.model).expanduser()
    if weights is None and folder.is_dir():
        weights = find_parts(folder).get("transformer")
    if weights is None:
        return False
    return any(".action_model." in name for name in open_checkpoint(weights, headers_only=True).weights)


@dataclass(frozen=True, slots=True)
class Walk:
    """A key script that is followed as a timeline is: a chunk hears every key of the pictures that it draws.

    Args:
        keys: held in each picture.
        rate: pictures per second.
        first, chunk: pictures of a stream's first chunk, and of the others.
    """

    keys: KeyScript
    rate: float
    first: int
    chunk: int

    @staticmethod
    def through(pipe: VideoPipeline, script: str) -> Walk:
        """What `script` says to `pipe`. ValueError for keys that it has not."""
        from ..models.stream_codec import PICTURES_PER_LATENT

        first = pipe.pictures_per_chunk - (PICTURES_PER_LATENT - 1)
        return Walk(KeyScript.parse(script, pipe.keys), pipe.rate, first, pipe.pictures_per_chunk)

    def follow(self, session: Session[Any, Any]) -> Callable[[float], None]:
        """What steers `session`: called with the seconds at which its next chunk begins."""
        coming, read = iter(self.keys), 0

        def steer(seconds: float) -> None:
            nonlocal read
            begun = round(seconds * self.rate)
            end = begun + (self.chunk if begun else self.first)
            session.steer(keys=frozenset().union(*(next(coming) for _ in range(end - read))))
            read = end

        return steer
