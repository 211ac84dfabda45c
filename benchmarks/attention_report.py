"""Results of a benchmark as they come: JSON after each, and error against speed-up in one plot."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch


class Report:
    """Results as they come, written after each so that a crash loses nothing."""

    def __init__(self, out: Path, shape: dict, limit: float) -> None:
        self.out, self.limit, self.began = out, limit, time.perf_counter()
        self.data: dict = {"machine": machine(), "shape": shape, "results": [], "failed": {}, "skipped": []}

    def add(self, name: str, make: Callable[[], dict | None], kind: str | None = None) -> dict | None:
        if time.perf_counter() - self.began > self.limit:
            self.data["skipped"].append(name)
            return None
        began = time.perf_counter()
        try:
            row = {"name": name, "input": kind, **(make() or {})}
        except Exception as error:  # one variant must not cost the others their numbers
            self.data["failed"][name] = f"{type(error).__name__}: {error}"[:500]
            print(f"{name:40s} FAILED {self.data['failed'][name][:160]}", flush=True)
            row = None
        else:
            self.data["results"].append(row)
            shown = " ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float))
            print(f"{name:26s} {kind or '':9s} {shown}  [{time.perf_counter() - began:.1f} s]", flush=True)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "attention.json").write_text(json.dumps(self.data, indent=1))
        return row


def machine() -> dict:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        import triton

        versions |= {"triton": triton.__version__, "cudnn": str(torch.backends.cudnn.version())}
        return {"device": torch.cuda.get_device_name(), **versions}
    return {"device": platform.processor() or platform.machine(), **versions}


def plot(results: list[dict], path: Path) -> None:
    """Error against speed-up, every method in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [r for r in results if r.get("speedup", 0) > 0 and r.get("error", 0) > 0]
    if not results:
        return
    figure, axes = plt.subplots(figsize=(9, 6), dpi=110)
    for kind, colour in (("random", "#8a8f98"), ("video", "#1f6feb")):
        points = [r for r in results if r["input"] == kind]
        axes.scatter(
            [r["speedup"] for r in points], [r["error"] for r in points], s=26, color=colour, label=f"{kind} input"
        )
        for r in points:
            if kind == "video":
                axes.annotate(
                    r["name"], (r["speedup"], r["error"]), xytext=(4, 3), textcoords="offset points", fontsize=7
                )
    axes.set(
        xscale="log", yscale="log", xlabel="speed-up over dense SDPA, plan making included", ylabel="relative error"
    )
    axes.grid(alpha=0.25, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
