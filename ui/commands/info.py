"""`millstream info`: this machine, the versions, the models that ship; or one video model, or one file of weights."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from ..machine import machine, versions
from ..video import VIDEO_OPTIONS, add_video_options, describe
from ..video import as_text as describe_as_text
from ..weights import as_text as file_as_text
from ..weights import describe_file
from ..world import positive_integer, shipped_models


def add(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("info", help="this machine, versions, shipped models and the memory each needs")
    parser.add_argument("--model", help="tell of this video model, or file of weights, instead")
    add_video_options(parser)
    parser.add_argument(
        "--streams", type=positive_integer, help="streams at once that memory is planned for (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    if arguments.model is not None and Path(arguments.model).expanduser().is_file():
        report = describe_file(arguments)
        print(json.dumps(report, indent=2) if arguments.json else file_as_text(report))
        return 0
    if arguments.model is not None:
        report = describe(arguments)
        print(json.dumps(report, indent=2) if arguments.json else describe_as_text(report))
        return 0
    for option in ("preset", "size", "dtype", "streams", *VIDEO_OPTIONS):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option} is about a video model; say which with --model")
    models = {name: measure(folder) for name, folder in shipped_models(kind=None).items()}
    report = {"machine": machine(), "versions": versions(), "models": models}
    print(json.dumps(report, indent=2) if arguments.json else as_text(report))
    return 0


def measure(folder: Path) -> dict[str, Any]:
    """Folder, bytes on disk, parameters, and bytes of the weights once loaded (float32), without the stream's own."""
    from safetensors import safe_open

    parameters = 0
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"folder": str(folder), "disk": disk, "parameters": parameters, "memory": 4 * parameters}


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    computer = report["machine"]
    lines = [
        f"{computer['system']}, {computer['processor']}, {computer['cores']} cores, {_size(computer['memory'])}",
        *(f"{gpu['name']}, {_size(gpu['memory'])}" for gpu in computer["accelerators"]),
        "",
        *(f"{name:14}{version or 'not installed'}" for name, version in report["versions"].items()),
        "",
    ]
    for name, model in report["models"].items():
        lines.append(
            f"{name:14}{model['parameters'] / 1e6:.1f}M parameters, {_size(model['disk'])} on disk, "
            f"{_size(model['memory'])} of weights in memory"
        )
    return "\n".join(lines if report["models"] else [*lines, "no models are shipped with this copy"])


def _size(count: int | None) -> str:
    if count is None:
        return "unknown memory"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
