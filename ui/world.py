"""What every command needs: a loaded world, values read from the command line, a walk recorded to a file."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..pipelines.assets import ASSETS

if TYPE_CHECKING:
    import torch

    from ..pipelines.video import VideoPipeline
    from ..pipelines.world import WorldPipeline
    from ..streaming import Session

VIDEO_SCALE = 4  # recordings of worlds are enlarged, since players blur a thumbnail
ON_GPU = 1024  # inputs and outputs of a product below which a GPU takes longer to quantise than it saves
THUMBNAIL = 240  # pixels of height below which a picture is one


def shipped_models(kind: str | None = "WorldPipeline") -> dict[str, Path]:
    """Name -> folder of each model of one kind that comes with the package; None: of every kind."""
    return {
        index.parent.name: index.parent
        for index in sorted(ASSETS.glob("*/model_index.json"))
        if kind is None or json.loads(index.read_text(encoding="utf-8"))["_class_name"] == kind
    }


def refuse_file(name: str) -> None:
    """ValueError if the model `name` is a file, which a model is not; the hub would be asked for owner/name."""
    if Path(name).expanduser().is_file():
        raise ValueError(f"{name} is a file, a model is a folder; give weights in a file as --checkpoint")


def load_world(name: str, device: str = "auto", preset: str | None = None) -> WorldPipeline:
    """The world model `name` (shipped, a folder, or owner/name on the Hugging Face hub) on `device`.

    A preset does to a world what it does to a video model, and chooses what it computes in: see `world_dtype`.

    Raises:
        FileNotFoundError: no such model.
        ValueError: a device that this machine lacks, an unknown preset, or weights that can't be read.
    """
    import torch

    from ..pipelines.presets import find_preset

    refuse_file(name)
    torch_device = pick_device(device)
    dtype, arithmetic = world_dtype(preset, torch_device.type), {}
    if preset is not None:
        chosen = find_preset(preset)
        arithmetic = {"preset": replace(chosen, narrowest=ON_GPU) if torch_device.type == "cuda" else chosen}
    shipped = shipped_models()
    on_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if name not in shipped and not on_hub and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"no model {name!r}: give one of {', '.join(shipped)}, or the path of a model's folder")

    from safetensors import SafetensorError

    from ..pipelines.world import WorldPipeline

    try:
        folder = name if name in shipped else str(Path(name).expanduser())
        pipe = WorldPipeline.from_pretrained(folder, **arithmetic)
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {name!r} can't be read ({error}): the file is damaged, so fetch it again"
        ) from error
    pipe = pipe.to(torch_device)
    if dtype != torch.float32:
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                torch.nn.Module.to(part, dtype)  # diffusers' own `to` warns of modules that others keep in float32
    return pipe


def world_dtype(preset: str | None, device: str) -> torch.dtype:
    """What a world computes and remembers in.

    `small` is bfloat16, half the memory; `fast` is that on a GPU, where it is quicker; `exact`, and none, are float32.

    Args:
        device: its type, such as "cpu".

    Raises:
        ValueError: an unknown preset, with those that are known.
    """
    import torch

    from ..pipelines.presets import find_preset

    name = "exact" if preset is None else find_preset(preset).name
    return torch.bfloat16 if name == "small" or (name == "fast" and device == "cuda") else torch.float32


def attend_as(pipe: WorldPipeline | VideoPipeline, attention: str | None) -> None:
    """Run the model's self-attention under the planner of `--attention`; None leaves the model's own."""
    if attention is not None:
        pipe.transformer.set_attention(attention)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is some, else the CPU. A device that isn't there is refused with what is."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{name} is not there: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"mps is not there: PyTorch {torch.__version__} finds no Apple GPU")
    return device


def model_folder(name: str, model: str, kind: str) -> str:
    """What `from_pretrained` takes for `name`: the shipped `model`, owner/name on the hub, or a folder.

    Raises:
        FileNotFoundError: it is none of these.
    """
    folder = Path(name).expanduser()
    if name != model and name.count("/") != 1 and not folder.is_dir():
        raise FileNotFoundError(f"no model {name!r}: give {model}, or the path of a {kind}'s folder")
    return str(folder) if folder.is_dir() else name


def positive_seconds(text: str) -> float:
    """For `argparse`: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return value


def positive_integer(text: str) -> int:
    """For `argparse`: 1, 2, ..."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(text)


def seed_integer(text: str) -> int:
    """For `argparse`: what `torch.Generator.manual_seed` takes and prints back the same."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**63 - 1, got {text!r}")
    return int(text)


def check_prompt(prompt: str, what: str = "a world", example: str = "a brick corridor with soldiers") -> str:
    """`prompt` if `what` can be drawn from it.

    Raises:
        ValueError: empty, or longer than is read.
    """
    from ..streaming.types import Control

    if not prompt.strip():
        raise ValueError(f'the prompt is empty; describe {what}, for example "{example}"')
    return Control(prompt=prompt).prompt


def check_recording(path: Path) -> None:
    """Refuse a path that can't be recorded to now, rather than after a minute of loading and drawing.

    Raises:
        OSError, ValueError: as `Recorder`, which looks when it is made.
    """
    from ..streaming import Recorder

    Recorder(path, rate=1.0).close()


def scale_of(size: Sequence[int]) -> int:
    """How often each pixel of a picture (height, width) is repeated each way in a recording."""
    return VIDEO_SCALE if size[0] < THUMBNAIL else 1


def say_nearest(pipe: WorldPipeline, prompt: str) -> None:
    """Tell on standard error which world `prompt` will be drawn like, unless it is that world's own caption."""
    world, similarity = pipe.nearest_world(prompt)
    if prompt.strip().lower() != world.lower():
        print(f'nearest world: "{world}" ({similarity:.2f})', file=sys.stderr)


def record(
    session: Session,
    path: Path,
    keys: Iterable[frozenset[str]],
    frames: int,
    *,
    switches: Mapping[int, str] | None = None,
) -> None:
    """Walk `frames` steps of `session` into the mp4 at `path`, under a progress bar, and say how it went.

    Interrupted, the file holds what was drawn until then.

    Args:
        keys: which keys are down in each frame.
        switches: index of a frame -> the prompt from there on.
    """
    from tqdm import tqdm

    from ..streaming import Recorder

    rate = session.pipeline.rate
    with Recorder(path, rate=rate, scale=VIDEO_SCALE) as recorder, tqdm(total=frames, unit="frame") as progress:
        start = time.monotonic()
        try:
            for frame, held in enumerate(islice(keys, frames)):
                session.steer(keys=held, **({"prompt": switches[frame]} if switches and frame in switches else {}))
                for chunk in session.step():
                    recorder.write(chunk)
                    progress.update(len(chunk.data))
        finally:
            seconds = time.monotonic() - start
            progress.close()
            recorder.close()
            drawn = recorder.frames
            if drawn:
                speed = f"drawn at {drawn / seconds:.1f} frames/s"
                print(f"{path}: {drawn} frames ({drawn / rate:.1f} s at {rate:g} frames/s), {speed}")
