"""What the commands need of a video model: its options, a pipeline, its plan, a clip recorded to a file."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .machine import machine
from .video_keys import Walk
from .world import attend_as, pick_device, refuse_file, shipped_models

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from ..pipelines.timeline import Script
    from ..pipelines.video import VideoPipeline
    from ..streaming import Chunk, Recorder, Session, VideoControl, VideoFile

DTYPES = ("float32", "bfloat16", "float16")
VIDEO_MODELS = ("VideoPipeline", "WanPipeline")  # class names in a model's index
VIDEO_OPTIONS = ("recipe", "checkpoint", "lora", "decoder")  # of every command that loads one, and of no other model
VIDEO_STRENGTH = 0.8  # of StreamDiffusionV2's demo; its recipe takes no less than 0.7
SECONDS = 10.0  # of a clip that nobody has given a length


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


def is_video_model(arguments: argparse.Namespace, options: Sequence[str] = VIDEO_OPTIONS) -> bool:
    """Do these arguments mean a video model, rather than a world?

    Args:
        options: those that only video models read. They tell, where the model's folder does not say what it holds.

    Raises:
        ValueError: the model's index can't be read.
    """
    from ..pipelines.video_load import find_parts

    name = arguments.model or ""
    folder = Path(name).expanduser()
    kind = class_of(folder) if name else None
    if name in shipped_models() or kind == "WorldPipeline":
        return False
    if kind in VIDEO_MODELS or arguments.recipe or arguments.checkpoint:
        return True
    if kind is not None:
        return False
    if any(getattr(arguments, option) is not None for option in options):
        return True
    return bool(name) and folder.is_dir() and not {"transformer", "vae", "text_encoder"}.isdisjoint(find_parts(folder))


def class_of(folder: Path) -> str | None:
    """The class that a folder's index names; None if there is no index, or no class in it.

    Raises:
        ValueError: the index is damaged.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return None
    try:
        stored = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index} is no JSON: {error}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{index} must hold an object, got a {type(stored).__name__}")
    kind = stored.get("_class_name")
    kind = kind[-1] if isinstance(kind, list) and kind else kind  # the library may stand before it
    if not isinstance(kind, str | None):
        raise ValueError(f"{index} must name a class in _class_name, got {kind!r}")
    return kind


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
    class_of(folder)  # says so if the index is damaged
    chosen = load_arguments(arguments, pick_device("auto"))
    streams = arguments.streams or 1
    pipe, plan = plan_for(folder, streams=streams, **chosen)
    plans = {name: plan_for(folder, streams=streams, **chosen | {"preset": name})[1] for name in PRESETS}
    reader = "image_encoder" if pipe.is_game else "text_encoder"
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
        "absent": [part for part in (reader, "decoder") if getattr(pipe, part) is None],
        "streams": streams,
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
        f"memory at {report['size'][0]} x {report['size'][1]} in {report['dtype']}, preset {report['preset']}, for "
        f"{'one stream' if report['streams'] == 1 else str(report['streams']) + ' streams'}:",
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
    more += f", {plan['with_inputs'] / 1e9:.2f} GB with image= or video=" if plan["with_inputs"] > plan["total"] else ""
    more += f", and {host / 1e9:.2f} GB on the host" if host else ""
    return f"--preset {name}: {plan['total'] / 1e9:.2f} GB{more}"


def load_video(arguments: argparse.Namespace) -> VideoPipeline:
    """The video pipeline that the arguments name, on its device."""
    from ..pipelines.video import VideoPipeline

    refuse_file(arguments.model)
    device = pick_device(arguments.device)
    pipe = VideoPipeline.from_pretrained(arguments.model, **load_arguments(arguments, device)).to(device)
    attend_as(pipe, getattr(arguments, "attention", None))
    return pipe


def run_video(arguments: argparse.Namespace) -> int:
    """Draw a clip of a video model into a file, from words, a picture or another video, or a walk by a key script.

    Raises:
        FileNotFoundError, ValueError: what is wrong with the files, the model or the length; no frame was drawn.
    """
    import torch
    from tqdm import tqdm

    from ..pipelines.timeline import Timeline
    from ..streaming import Recorder, VideoFile
    from .world import check_recording

    check_recording(arguments.output)
    for path in (arguments.image, arguments.video):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
    if arguments.strength is not None and arguments.video is None:
        raise ValueError("--strength is how far --video is redrawn; give a video too")
    script: Script | None = None if arguments.timeline is None else Timeline.load(arguments.timeline)
    prompt = script.prompt if isinstance(script, Timeline) else arguments.prompt or ""
    start = None if arguments.image is None else read_picture(arguments.image)
    video = None if arguments.video is None else VideoFile(arguments.video)
    pipe = load_video(arguments)
    if pipe.is_game:
        script = Walk.through(pipe, "KeyW" if arguments.keys is None else arguments.keys)
    total = length_of(arguments, pipe.rate)
    unasked = 1.0 if video is None else VIDEO_STRENGTH
    settings = {
        "image": start,
        "strength": unasked if arguments.strength is None else arguments.strength,
        "generator": torch.Generator().manual_seed(arguments.seed),
    }
    with (
        Recorder(arguments.output, rate=pipe.rate) as recorder,
        tqdm(total=total, unit="frame") as progress,
        pipe.stream(prompt, **settings) as session,
    ):
        if video is None:
            assert total is not None, "only a video has a length of its own"
            drawn = pipe.drain(session, total, timeline=script)
        else:
            drawn = redraw(pipe, session, video, total, script)
        for chunks in drawn:
            for chunk in chunks:
                write_up_to(recorder, chunk, total)
            progress.update(recorder.frames - progress.n)
    if not recorder.frames:
        raise ValueError("no frame was drawn, so nothing was written")
    length = f"{recorder.frames} frames ({recorder.frames / pipe.rate:.1f} s at {pipe.rate:g} frames/s)"
    print(f"{arguments.output}: {length}")
    return 0


def length_of(arguments: argparse.Namespace, rate: float) -> int | None:
    """How many frames are asked for; None is all of `--video`."""
    if arguments.frames is not None:
        return arguments.frames
    if arguments.seconds is None and arguments.video is not None:
        return None
    return max(1, round((arguments.seconds or SECONDS) * rate))


def redraw(
    pipe: VideoPipeline,
    session: Session[Any, VideoControl],
    video: VideoFile,
    total: int | None,
    timeline: Script | None,
) -> Iterator[Sequence[Chunk]]:
    """What `session` makes of `video`, read at the pipeline's rate: one frame for each picture, at most `total`."""
    from ..streaming import Frame, fit
    from .live import at_rate, redrawn

    follow = None if timeline is None else timeline.follow(session)

    def frames() -> Iterator[Frame]:
        for number, picture in enumerate(islice(at_rate(video, video.rate, pipe.rate), total)):
            if follow is not None:
                follow((0 if session.state is None else pipe.begun(session.state)) / pipe.rate)
            yield Frame(fit(picture, pipe.size), number / pipe.rate)

    try:
        yield from redrawn(session, frames(), pipe.pictures_per_chunk)
    finally:
        video.close()


def write_up_to(recorder: Recorder, chunk: Chunk, total: int | None) -> None:
    """Record as much of `chunk` as makes `total` frames in all; None is all of it."""
    if total is None:
        recorder.write(chunk)
    elif recorder.frames < total:
        recorder.write(replace(chunk, data=chunk.data[: total - recorder.frames]))


def read_picture(path: Path) -> Image:
    """The picture in a file, upright, or the first one of a video.

    Raises:
        ValueError: the file is neither, or damaged.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    from ..pipelines.video_output import as_output
    from ..streaming import VideoFile

    try:
        try:
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image)
        except UnidentifiedImageError:
            video = VideoFile(path)
        first = next(iter(video))
        video.close()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise ValueError(f"{path} is no picture or video that can be read") from None
    return as_output(first[None], "pil")[0]
