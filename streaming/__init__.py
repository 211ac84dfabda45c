"""Everything that lives across time: chunks, controls, sessions, mailboxes, sources, sinks, metrics. Knows no model."""

from .fit import fit
from .image_control import ImageControl
from .jitter import JitterBuffer, Playout
from .kv_cache import KVCache
from .live import live
from .mailbox import Bounded, Closed, Latest
from .metrics import Metrics
from .network import NetworkCamera
from .recorder import Recorder
from .session import Session, step_together
from .sinks import Steady, Tee, VirtualCamera
from .snapshot import Snapshot
from .sound_sinks import Speaker, WavFile
from .sources import Camera, VideoFile
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
    "Camera",
    "Chunk",
    "Closed",
    "Control",
    "EndOfStream",
    "Frame",
    "ImageControl",
    "JitterBuffer",
    "KVCache",
    "Latest",
    "Leaves",
    "Metrics",
    "NetworkCamera",
    "Playout",
    "Recorder",
    "Session",
    "Sink",
    "Snapshot",
    "Source",
    "Speaker",
    "SpeechControl",
    "Steady",
    "Streamable",
    "Tee",
    "VideoControl",
    "VideoFile",
    "VirtualCamera",
    "WavFile",
    "WorldControl",
    "fit",
    "live",
    "step_together",
]
