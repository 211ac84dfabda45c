"""Results of a benchmark as they come: JSON after each, and error against speed-up in one plot.

python benchmarks/attention_report.py results/attention.json                           # the table and the plot
python benchmarks/attention_report.py results/attention.json --docs docs/attention.md  # put into the guide
"""

from __future__ import annotations

import argparse
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
        self.save()
        return row

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "attention.json").write_text(json.dumps(self.data, indent=1))


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


MARKS = ("<!-- measured -->", "<!-- /measured -->")


def table(data: dict, kind: str = "video") -> str:
    """The rows of one kind of input as a Markdown table, with FlexAttention's time where the blocks are the same."""
    rows = [row for row in data["results"] if row["input"] == kind and "ms" in row]
    flex = {row["name"].removeprefix("flex "): row["ms"] for row in rows if row["name"].startswith("flex")}
    lines = [
        "| | ms | plan ms | density | speed-up | error | FlexAttention ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row["name"].startswith("flex"):
            continue
        other = flex.get(row["name"].removeprefix("kernel ")) if row["name"].startswith("kernel") else None
        cells = [row["name"], f"{row['ms']:.2f}", f"{row['plan_ms']:.2f}", f"{row['density']:.0%}"]
        cells += [f"{row['speedup']:.2f}" if "speedup" in row else "", f"{row['error']:.4f}"]
        lines.append("| " + " | ".join([*cells, f"{other:.2f}" if other else ""]) + " |")
    for row in data["results"]:
        if row["name"].startswith(("reuse", "few queries", "chunk")):
            numbers = ", ".join(f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float))
            lines.append(f"\n{row['name']}: {numbers}")
    shape = data["shape"]
    head = (
        f"{data['machine']['device']}, torch {data['machine']['torch']}; {shape['tokens']:,} tokens, "
        f"{shape['heads']} heads of {shape['dim']}; inputs smooth over the grid, like video:\n\n"
    )
    return head + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--docs", type=Path, help=f"a guide with the lines {MARKS[0]} and {MARKS[1]} to write between")
    options = parser.parse_args()
    data = json.loads(options.json.read_text())
    text = table(data)
    print(text)
    if options.docs:
        before, rest = options.docs.read_text().split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        options.docs.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")
    plot(data["results"], options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
