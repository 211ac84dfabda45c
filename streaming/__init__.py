"""Everything that lives across time: chunks, controls, sessions, mailboxes, sources, sinks, metrics. Knows no model."""

from .mailbox import Bounded, Closed, Latest
from .metrics import Metrics
from .recorder import Recorder
from .session import Session, step_together
from .snapshot import Snapshot
from .types import (
    MAX_PROMPT_CHARACTERS,
    Chunk,
    Control,
    EndOfStream,
    Frame,
    Leaves,
    Sink,
    Source,
    SpeechControl,
    Streamable,
    VideoControl,
    WorldControl,
)

__all__ = [
    "MAX_PROMPT_CHARACTERS",
    "Bounded",
    "Chunk",
    "Closed",
    "Control",
    "EndOfStream",
    "Frame",
    "Latest",
    "Leaves",
    "Metrics",
    "Recorder",
    "Session",
    "Sink",
    "Snapshot",
    "Source",
    "SpeechControl",
    "Streamable",
    "VideoControl",
    "WorldControl",
    "step_together",
]
