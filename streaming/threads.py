"""Cores for the thread that draws."""

from __future__ import annotations

import ctypes
from pathlib import Path


def rest() -> None:
    """Let go of the calling thread's OpenMP workers, because another thread is about to draw.

    GNU OpenMP counts the workers of all threads. Beyond one per core it lets them sleep between operations, and waking
    them takes longer than a small operation: with a pipeline that was loaded on one thread and drawn on another, a step
    of the embedded world took 83 ms instead of 52 on two cores. The workers come back when this thread needs them.
    Harmless where there is another OpenMP or none.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        library = next(line.split()[-1] for line in maps.splitlines() if "libgomp" in line)
        pause = ctypes.CDLL(library).omp_pause_resource_all
    except (OSError, StopIteration, AttributeError):
        return
    pause(1)  # omp_pause_soft: what was set stays set
