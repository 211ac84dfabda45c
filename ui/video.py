"""What the commands need of a video model: its options, a pipeline, its plan, a clip recorded to a file."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .machine import machine
from .world import attend_as, pick_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..pipelines.video import VideoPipeline

DTYPES = ("float32", "bfloat16", "float16")
VIDEO_MODELS = ("VideoPipeline", "WanPipeline")  # class names in a model's index


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that loads a video model; `--model` is the command's own."""
    parser.add_argument("--preset", help="exact, fast or small: what may be given up for speed or memory")
    group = parser.add_argument_group("video models (Wan and its causal kin, in diffusers' layout)")
    group.add_argument("--recipe", help="how the weights are run: self_forcing, longlive, krea, ...")
    group.add_argument("--checkpoint", type=Path, help="weights of any dialect in place of the model's transformer")
    group.add_argument("--lora", type=Path, help="an adapter to merge into them")
    group.add_argument("--decoder", type=Path, help="TAEHV weights (taew2_1.pth) to decode with")
    group.add_argument("--size", type=video_size, metavar="HxW", help="of the pictures (default: the model's own)")
    group.add_argument("--dtype", choices=DTYPES, help="of the weights (default: 16 bits on CUDA, else float32)")


def video_size(text: str) -> tuple[int, int]:
    """For `argparse`: height x width, such as 480x832."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH in pixels, such as 480x832, got {text!r}")
    return int(match[1]), int(match[2])


def is_video_model(arguments: argparse.Namespace) -> bool:
    """Do these arguments mean a video model, rather than a world?"""
    if arguments.recipe or arguments.checkpoint:
        return True
    index = Path(arguments.model or "").expanduser() / "model_index.json"
    if not index.is_file():
        return False
    kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    return (kind[-1] if isinstance(kind, list) else kind) in VIDEO_MODELS


def load_arguments(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The arguments of `VideoPipeline.from_pretrained`."""
    import torch

    name = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    chosen: dict[str, Any] = {"torch_dtype": getattr(torch, name)}
    for option in ("recipe", "preset", "checkpoint", "lora", "decoder", "size"):
        if getattr(arguments, option) is not None:
            chosen[option] = getattr(arguments, option)
    return chosen


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a video model is and takes, without loading it.

    Raises:
        FileNotFoundError, ValueError: what loading would refuse, with what is missing.
    """
    from ..models.checkpoints import open_checkpoint
    from ..pipelines.memory import plan_for
    from ..pipelines.presets import PRESETS
    from ..pipelines.recipes import as_config
    from ..pipelines.video_load import find_parts, local_folder

    folder = local_folder(arguments.model, transformer=arguments.checkpoint is None)
    chosen = load_arguments(arguments, pick_device("auto"))
    pipe, plan = plan_for(folder, **chosen)
    plans = {name: plan_for(folder, **chosen | {"preset": name})[1] for name in PRESETS}
    weights = arguments.checkpoint or find_parts(folder)["transformer"]
    return {
        "folder": str(folder),
        "weights": str(weights),
        "dialect": open_checkpoint(weights, headers_only=True).dialect,
        "parameters": sum(parameter.numel() for parameter in pipe.transformer.parameters()),
        "blocks": pipe.transformer.config["num_layers"],
        "recipe": as_config(pipe.recipe),
        "size": list(pipe.size),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "absent": [part for part in ("text_encoder", "decoder") if getattr(pipe, part) is None],
        "preset": pipe.preset.name,
        "presets": {name: each.as_json() for name, each in plans.items()},
        "plan": plan.as_json(),
        "plan_text": plan.as_text(),
    }


def as_text(report: dict[str, Any]) -> str:
    """The report of `describe` for people, with how it fits this machine's accelerators."""
    recipe, plan = report["recipe"], report["plan"]
    lines = [
        f"{report['weights']}: {report['dialect']} weights, {report['parameters'] / 1e9:.2f} billion parameters, "
        f"{report['blocks']} blocks",
        f"recipe {recipe['name']}: timesteps {', '.join(f'{t:g}' for t in recipe['timesteps'])}, chunks of "
        f"{recipe['chunk']}, window {recipe['window']}, {recipe['sinks']} sinks",
        *([f"note: {recipe['note']}"] if recipe["note"] else []),
        *([f"without {', '.join(report['absent'])}"] if report["absent"] else []),
        "",
        f"memory at {report['size'][0]} x {report['size'][1]} in {report['dtype']}, preset {report['preset']}, for one "
        "stream:",
        report["plan_text"],
        "",
        *(_preset_line(name, each) for name, each in report["presets"].items()),
        "",
    ]
    for gpu in machine()["accelerators"]:
        if gpu["memory"] is None:
            continue
        fits = "fits" if plan["total"] <= gpu["memory"] else "does not fit"
        if fits != "fits" and plan["without_text_encoder"] <= gpu["memory"]:
            fits = "fits once the text encoder is dropped"
        fitting = [name for name, each in report["presets"].items() if each["total"] <= gpu["memory"]]
        if fits == "does not fit" and fitting:
            fits += f", --preset {fitting[0]} does"
        lines.append(f"{gpu['name']}, {gpu['memory'] / 1e9:.1f} GB: {fits}")
    return "\n".join(lines)


def _preset_line(name: str, plan: dict[str, Any]) -> str:
    """What a preset takes in all, for people."""
    host = sum(plan["host"].values())
    without = plan["without_text_encoder"]
    more = f", {without / 1e9:.2f} GB once the text encoder is dropped" if without < plan["total"] else ""
    more += f", and {host / 1e9:.2f} GB on the host" if host else ""
    return f"--preset {name}: {plan['total'] / 1e9:.2f} GB{more}"


def load_video(arguments: argparse.Namespace) -> VideoPipeline:
    """The video pipeline that the arguments name, on its device."""
    from ..pipelines.video import VideoPipeline

    device = pick_device(arguments.device)
    pipe = VideoPipeline.from_pretrained(arguments.model, **load_arguments(arguments, device)).to(device)
    attend_as(pipe, getattr(arguments, "attention", None))
    return pipe


def run_video(arguments: argparse.Namespace) -> int:
    """Draw a clip of a video model into a file, from words, a picture or another video."""
    import torch
    from tqdm import tqdm

    from ..pipelines.timeline import Timeline
    from ..streaming import Recorder
    from .world import check_recording

    check_recording(arguments.output)
    for path in (arguments.image, arguments.video):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
    timeline = None if arguments.timeline is None else Timeline.load(arguments.timeline)
    prompt = arguments.prompt if timeline is None else timeline.prompt
    pipe = load_video(arguments)
    count = arguments.frames or max(1, round(arguments.seconds * pipe.rate))
    generator = torch.Generator().manual_seed(arguments.seed)
    media = None if arguments.video is None else pictures(arguments.video, pipe.size)
    start = None if arguments.image is None else next(pictures(arguments.image, pipe.size))
    drawn = 0
    with (
        Recorder(arguments.output, rate=pipe.rate) as recorder,
        tqdm(total=count, unit="frame") as progress,
        pipe.stream(prompt, image=start, strength=arguments.strength, generator=generator) as session,
    ):
        for chunks in pipe.drain(session, count, media, timeline):
            for chunk in chunks:
                recorder.write(chunk)
                drawn += len(chunk.data)
                progress.update(len(chunk.data))
    print(f"{arguments.output}: {drawn} frames ({drawn / pipe.rate:.1f} s at {pipe.rate:g} frames/s)")
    return 0


def pictures(path: Path, size: tuple[int, int]) -> Iterator[Tensor]:
    """The pictures of an image or a video file, scaled and cut to `size`."""
    try:
        import imageio.v3 as imageio
    except ImportError:
        raise ImportError('reading pictures needs imageio: pip install "imageio[ffmpeg]"') from None
    from PIL import Image

    from ..pipelines.video_output import as_picture

    for picture in imageio.imiter(path):
        yield as_picture(Image.fromarray(picture), size)
