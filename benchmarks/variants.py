"""Measure variants one after the other, so that a broken or slow one costs the others nothing."""

from __future__ import annotations

import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

Measure = Callable[[], dict[str, Any]]


def chosen(plan: dict[str, Any], only: str | None, separator: str = ";") -> dict[str, Any]:
    """What of `plan` has one of the words of `only` in its name; all of it without any."""
    words = [word.strip() for word in only.split(separator)] if only else [""]
    return {name: part for name, part in plan.items() if any(word in name for word in words)}


def measure_all(
    plan: Mapping[str, Measure],
    seconds: float,
    *,
    reserve: Callable[[str], float] = lambda name: 0.0,
    after: Callable[[], object] = lambda: None,
    keep: Callable[[dict[str, dict[str, Any]]], object] = lambda measured: None,
) -> dict[str, dict[str, Any]]:
    """What each variant measured, or why it did not; each is also printed as a comment on standard error.

    Args:
        plan: the most important first.
        seconds: start no variant after this time.
        reserve: seconds that a variant is known to need before it measures.
        after: called after each variant that ran.
        keep: called then with all that was measured so far.
    """
    start = time.perf_counter()
    measured: dict[str, dict[str, Any]] = {}
    for name, measure in plan.items():
        began = time.perf_counter()
        if began - start + reserve(name) > seconds:
            measured[name] = {"skipped": "no time left"}
            continue
        try:
            measured[name] = measure()
        except Exception as error:  # one broken variant must not cost the others their numbers
            traceback.print_exc()
            measured[name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        after()
        measured[name]["benchmark_seconds"] = round(time.perf_counter() - began, 1)
        keep(measured)
        print(f"# {name}: {json.dumps(measured[name])}", file=sys.stderr, flush=True)
    return measured


def publish(report: dict[str, Any], out: str | None, *, printed: bool = True) -> None:
    """Print the report as JSON, and write it to the file `out` if there is one."""
    text = json.dumps(report, indent=1)
    if printed:
        print(text)
    if out:
        with open(out, "w", encoding="utf-8") as file:
            file.write(text + "\n")


def describe(device: torch.device) -> dict[str, Any]:
    """What ran this."""
    cuda = device.type == "cuda"
    return {
        "name": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
