"""What `millstream live` needs of a diffusers image pipeline: is it one, its options, the live pipeline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .world import pick_device

if TYPE_CHECKING:
    from ..pipelines.live_image import LiveImagePipeline
    from ..streaming import ImageControl

NOT_IMAGES = ("WorldPipeline", "VideoPipeline", "WanPipeline", "ImagePipeline")


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """The options that only an image pipeline reads; `--model` is the command's own."""
    group = parser.add_argument_group("image pipelines (diffusers: Stable Diffusion, SDXL, SD3, FLUX, SANA-Sprint)")
    group.add_argument("--guidance", choices=("none", "self", "initialize", "full"), help="default: none")
    group.add_argument("--guidance-scale", type=float, help="how closely to follow the prompt")
    group.add_argument("--negative-prompt", default="", help="what not to draw, for initialize and full")
    group.add_argument("--tiny", metavar="PATH_OR_REPO", help="an AutoencoderTiny, much faster: madebyollin/taesd")
    group.add_argument("--compile", action="store_true", help="compile the network: faster after a minute")


def is_image_model(name: str) -> bool:
    """Is this the folder, or the repository (owner/name), of a diffusers image pipeline?"""
    parts: Any
    index = Path(name).expanduser() / "model_index.json"
    if index.is_file():
        parts = json.loads(index.read_text(encoding="utf-8"))
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists():
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        try:
            parts = DiffusionPipeline.load_config(name)
        except OSError:  # no such repository, or no network: whoever loads the model says so
            return False
    else:
        return False
    kind = parts.get("_class_name")
    return (kind[-1] if isinstance(kind, list) else kind) not in NOT_IMAGES and "vae" in parts


def control_of(arguments: argparse.Namespace, strength: float) -> ImageControl:
    """What the session is opened with.

    Raises:
        ValueError: a value out of range.
    """
    from ..streaming import ImageControl

    return ImageControl(
        arguments.prompt,
        strength=strength,
        num_inference_steps=arguments.steps,
        guidance=arguments.guidance or "none",
        guidance_scale=arguments.guidance_scale,
        negative_prompt=arguments.negative_prompt,
        skip_similar=arguments.skip_similar,
    )


def load_live_image(arguments: argparse.Namespace, control: ImageControl) -> LiveImagePipeline:
    """The live pipeline that the arguments name, on its device and warm for `control` where that takes a while.

    Raises:
        ValueError: a pipeline of a kind that cannot run live, or a device that this machine lacks.
    """
    import torch
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from ..pipelines.live_image import LiveImagePipeline

    device = pick_device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("float16" if device.type == "cuda" else "float32"))
    name = Path(arguments.model).expanduser()
    pipe: Any = DiffusionPipeline.from_pretrained(str(name) if name.is_dir() else arguments.model, torch_dtype=dtype)
    tiny: Any = None
    if arguments.tiny is not None:
        codec: Any = AutoencoderTiny.from_pretrained(arguments.tiny, torch_dtype=dtype)
        tiny = codec.to(device)
    pipe = pipe.to(device)
    live = LiveImagePipeline.from_diffusers(
        pipe, size=arguments.size, tiny=tiny, compile=arguments.compile, overlap=device.type == "cuda"
    )
    if device.type == "cuda" or arguments.compile:
        live.warmup(control)
    return live
