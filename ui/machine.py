"""What this machine is: shown by `millstream info`, and printed above every measurement."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("millstream", "torch", "diffusers", "accelerate", "transformers", "safetensors"),
    *("opencv-python", "imageio", "gradio", "triton", "vizdoom"),
)


def machine() -> dict[str, Any]:
    """System, processor, memory in bytes and accelerators."""
    import torch

    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory": _memory(),
        "accelerators": _accelerators(),
    }


def versions() -> dict[str, str | None]:
    """Version of Python and of each package that matters; None where it isn't installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def peak_memory() -> int:
    """The most bytes of memory this process has held so far, the accelerator's not counted."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    # What this process may use, which in a container is less than what the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int | None:
    names = getattr(os, "sysconf_names", {})
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None


def _accelerators() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append({"name": properties.name, "memory": properties.total_memory})
    if torch.backends.mps.is_available():
        found.append({"name": "Apple GPU (mps)", "memory": None})
    return found
