"""How the steps and stages of a stream of video are timed."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from millstream.streaming.pixels import as_bytes, on_host


class Clock:
    """How long named calls take on the device, without waiting for it in between."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
        start = self.mark()
        result = call()
        self.spans[name].append((start, self.mark()))
        return result

    @contextmanager
    def watching(self, owner: Any, name: str) -> Any:
        """Time every call of a method of `owner`."""
        inner = getattr(owner, name)
        owner.__dict__[name] = lambda *args, **kwargs: self.timed(name, lambda: inner(*args, **kwargs))
        try:
            yield
        finally:
            del owner.__dict__[name]

    def milliseconds(self, count: int) -> dict[str, float]:
        if self.cuda:
            torch.cuda.synchronize()
            return {k: sum(a.elapsed_time(b) for a, b in spans) / count for k, spans in self.spans.items()}
        return {k: 1e3 * sum(b - a for a, b in spans) / count for k, spans in self.spans.items()}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(call: Callable[[], object], device: torch.device, count: int) -> float:
    """Milliseconds of a call that has run before."""
    times = []
    for _ in range(count):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def stepped(session: Any, device: torch.device) -> tuple[float, int]:
    """Seconds of one step with its pictures on the host, and how many there are."""
    start = time.perf_counter()
    drawn = sum(len(on_host(as_bytes(chunk.data))) for chunk in session.step())
    wait(device)
    return time.perf_counter() - start, drawn


def until_first(session: Any, device: torch.device) -> float:
    """Milliseconds until a session has given its first picture."""
    start = time.perf_counter()
    while not stepped(session, device)[1]:
        pass
    return 1e3 * (time.perf_counter() - start)


def summary(steps: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Frames per second, and the spread of step times."""
    seconds = sorted(taken for taken, _ in steps)
    p50, p95, p99 = (seconds[max(0, -(-percent * len(seconds) // 100) - 1)] for percent in (50, 95, 99))
    return {
        "frames_per_second": sum(drawn for _, drawn in steps) / sum(seconds),
        **{"step_p50": 1e3 * p50, "step_p95": 1e3 * p95, "step_p99": 1e3 * p99, "p99_over_p50": p99 / p50},
        "steps": len(steps),
    }


def memory(device: torch.device) -> dict[str, int]:
    """Bytes in use and at most in use, and how often the driver was asked for memory so far."""
    if device.type != "cuda":
        return {}
    counted = torch.cuda.memory_stats(device)
    return {
        "memory": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "peak_memory": torch.cuda.max_memory_allocated(device),
        "device_allocations": counted["num_device_alloc"],
    }


def kernels(session: Any, device: torch.device) -> list[dict[str, Any]]:
    """The kernels that take the most of one steady chunk."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        stepped(session, device)
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)[:25]
    return [
        {"name": row.key[:90], "calls": row.count, "milliseconds": row.self_device_time_total / 1e3} for row in rows
    ]
