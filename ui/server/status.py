"""What a client is told about its session: once when it is welcomed, then every second."""

from __future__ import annotations

from typing import Any

from ...streaming import MAX_PROMPT_CHARACTERS
from ...streaming.live import pictures_per_chunk
from .contract import Servable
from .eye import Eye
from .outbox import Outbox
from .pictures import MAX_PIXELS
from .protocol import MAX_CAMERA_BYTES, MAX_STEPS, MAX_TIMELINE, PROTOCOL
from .seat import Seat
from .sessions import Sessions
from .settings import Settings


def describe(pipe: Servable) -> dict[str, Any]:
    """What the page needs to know about a pipeline; parts that it doesn't have are empty."""
    return {
        "size": list(getattr(pipe, "size", ())),
        "rate": pipe.rate,
        "worlds": list(getattr(pipe, "worlds", ())),
        "keys": dict(getattr(pipe, "key_map", {})),
        "pictures": pictures_per_chunk(pipe),
        "voices": list(getattr(pipe, "voices", ())),
        "sampling_rate": getattr(pipe, "sampling_rate", None),
    }


def welcome(seat: Seat, settings: Settings, *, resumed: bool, formats: tuple[str, ...]) -> dict[str, Any]:
    """The answer to hello."""
    control = seat.session.control
    return {
        "type": "welcome",
        "protocol": PROTOCOL,
        "session": seat.name,
        "resume": seat.secret,
        "resumed": resumed,
        "model": settings.model,
        "recipe": settings.recipe,
        "preset": settings.preset,
        **describe(seat.pipe),
        "mode": seat.mode,
        "running": seat.running,
        "prompt": control.prompt,
        "seed": seat.seed,
        "controls": [name for name in control.__dataclass_fields__ if name != "version"],
        "formats": list(formats),
        "limits": {
            "prompt": MAX_PROMPT_CHARACTERS,
            "camera_bytes": MAX_CAMERA_BYTES,
            "camera_pixels": MAX_PIXELS,
            "num_inference_steps": MAX_STEPS,
            "timeline": MAX_TIMELINE,
            "back_seconds": settings.history_seconds,
            "branches": settings.max_branches,
            "idle_seconds": settings.idle_seconds,
            "recording_bytes": settings.recording_bytes,
        },
    }


def status(seat: Seat, sessions: Sessions, outbox: Outbox, eye: Eye | None, age_ms: float | None) -> dict[str, Any]:
    """How the stream is doing. Times are in milliseconds; None before there are any."""
    metrics = seat.session.metrics
    steps = {f"p{percent}": _milliseconds(metrics.step_seconds(percent)) for percent in (50, 95, 99)}
    numbers: dict[str, Any] = {
        "type": "status",
        "fps": round(metrics.fps, 2) if seat.ready or seat.running else 0.0,
        "step_ms": steps,
        "age_ms": age_ms,
        "dropped": outbox.dropped + seat.inbox.dropped + (eye.dropped if eye else 0),
        "applied": seat.session.applied,
        "prompt": seat.session.control.prompt,
        "frame": round(seat.position * seat.pipe.rate),
        "running": seat.running,
        "memory_mb": memory_mb(),
        "sessions": len(sessions.seats),
        "waiting": len(sessions.waiting),
        "quality": outbox.flow.quality,
    }
    if metrics.sound_seconds:
        numbers["sound"] = {
            "seconds": round(metrics.sound_seconds, 2),
            "real_time_factor": round(metrics.real_time_factor or 0.0, 3),
            "underruns": seat.underruns,
        }
    if seat.nearest is not None:
        numbers["nearest"] = {"world": seat.nearest[0], "similarity": round(seat.nearest[1], 3)}
    if seat.recording is not None:
        recording = seat.recording
        numbers["recording"] = {"seconds": recording.seconds, "bytes": recording.bytes, "stopped": recording.stopped}
    return numbers


def memory_mb() -> float:
    """Megabytes that this process holds, and what PyTorch holds on the accelerator."""
    import psutil
    import torch

    held = psutil.Process().memory_info().rss
    if torch.cuda.is_available():
        held += torch.cuda.memory_allocated()
    return round(held / 2**20, 1)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)
