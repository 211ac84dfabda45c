"""millstream: live generative media, made while you watch and steer it.

    import millstream as ms

Names are looked up on first use (PEP 562), so importing the package costs nothing and pulls in no PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipelines.audio import AudioPipeline
    from .pipelines.image import ImagePipeline
    from .pipelines.live_image import LiveImagePipeline
    from .pipelines.video import VideoPipeline
    from .pipelines.world import WorldPipeline
    from .streaming import (
        Camera,
        Chunk,
        Control,
        Frame,
        ImageControl,
        Recorder,
        Session,
        SpeechControl,
        VideoControl,
        VideoFile,
        WorldControl,
        live,
    )
    from .ui.window import Window

__all__ = [
    "AudioPipeline",
    "Camera",
    "Chunk",
    "Control",
    "Frame",
    "ImageControl",
    "ImagePipeline",
    "LiveImagePipeline",
    "Recorder",
    "Session",
    "SpeechControl",
    "VideoControl",
    "VideoFile",
    "VideoPipeline",
    "Window",
    "WorldControl",
    "WorldPipeline",
    "live",
]

_ELSEWHERE = {
    "AudioPipeline": ".pipelines.audio",
    "ImagePipeline": ".pipelines.image",
    "LiveImagePipeline": ".pipelines.live_image",
    "VideoPipeline": ".pipelines.video",
    "Window": ".ui.window",
    "WorldPipeline": ".pipelines.world",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("millstream")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_ELSEWHERE.get(name, ".streaming"), __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
