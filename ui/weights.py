"""What a file of weights alone is, what it lacks to run, and how it is run then: `millstream info --model FILE`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

UNREAD = ("preset", "checkpoint", "lora", "decoder", "size", "dtype", "streams")  # options that plan a whole model
# What weights in a form are run by, the likeliest first. Released weights are not causal, so nothing is guessed there.
RECIPES = {
    "self_forcing": ("self_forcing", "rolling_forcing", "longlive"),
    "causvid": ("causvid", "longlive"),
    "streamdiffusion_v2": ("streamdiffusion_v2",),
    "krea": ("krea", "self_forcing"),
    "lora": ("longlive",),
}
# Folders that have the other parts, by the width and the latent channels of the transformer.
FOLDERS = {
    (1536, 16): "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    (5120, 16): "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    (3072, 48): "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
}
PLAYED = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"  # whose CLIP and autoencoder Matrix-Game 2 shares


def describe_file(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the file `arguments.model` is and lacks; only its header is read.

    Raises:
        ValueError: it is damaged, unsafe or no part of a Wan model; an option is about whole models.
    """
    from ..pipelines.recipes import find_recipe

    file = Path(arguments.model).expanduser()
    for option in UNREAD:
        if getattr(arguments, option) is not None:
            raise ValueError(
                f"--{option} is about a whole model, and {file} is a file: name the model's folder as --model, and "
                "this file as --checkpoint"
            )
    if arguments.recipe is not None:
        find_recipe(arguments.recipe)
    report = {"file": str(file), **_told(file)}
    recipes = [arguments.recipe] if arguments.recipe else report.get("recipes", [])
    return report | {"recipes": recipes, "command": _command(report, recipes)}


def _told(file: Path) -> dict[str, Any]:
    from ..models.checkpoints import load_text_encoder, load_vae, open_checkpoint
    from ..models.checkpoints.files import named_tensors, read_weights
    from ..models.checkpoints.load import flat
    from ..pipelines.video_load import RELEASED, load_tiny_decoder

    stored = read_weights(file, headers_only=True)
    names = {**flat(stored, file), **named_tensors(stored, file)}
    if "decoder.conv_in.weight" in names or RELEASED["vae"] in names:
        return {"kind": "autoencoder", **_counted(load_vae(file, headers_only=True).state_dict())}
    if "shared.weight" in names or RELEASED["text_encoder"] in names:
        return {"kind": "text encoder", **_counted(load_text_encoder(file, headers_only=True).state_dict())}
    if "decoder.22.weight" in names:
        return {"kind": "tiny decoder", **_counted(load_tiny_decoder(file, headers_only=True).state_dict())}
    found = open_checkpoint(file, headers_only=True)
    return _adapter(found.weights) if found.dialect == "lora" else _transformer(file, found.dialect)


def _counted(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in weights.values()})
    sizes = [(value.numel(), value.element_size()) for value in weights.values()]
    return {
        "parameters": sum(count for count, _ in sizes),
        "bytes": sum(count * size for count, size in sizes),
        "dtypes": kinds,
    }


def _adapter(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    halves = [value for name, value in weights.items() if name.endswith("lora_A.weight")]
    ranks = sorted({value.shape[0] for value in halves if value.ndim})
    return {
        "kind": "adapter",
        "dialect": "lora",
        **_counted(weights),
        "layers": len(halves),
        "ranks": ranks,
        "recipes": list(RECIPES["lora"]),
        "missing": ["transformer", "vae", "text_encoder", "tokenizer"],
    }


def _transformer(file: Path, dialect: str) -> dict[str, Any]:
    from ..models.checkpoints import load_transformer

    model = load_transformer(file, headers_only=True)
    config = model.config
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    played, channels = bool(config["action_modules"]), config["out_channels"] or config["in_channels"]
    beside = config["in_channels"] - channels
    recipes = ["matrix_game_2"] if played else list(RECIPES.get(dialect, ()))
    return {
        "kind": "transformer",
        "dialect": dialect,
        **_counted(model.state_dict()),
        "blocks": config["num_layers"],
        "width": dim,
        "latent_channels": channels,
        "played": played,
        "runs": played or not beside,
        "recipes": recipes,
        "missing": ["vae", "image_encoder"] if played else ["vae", "text_encoder", "tokenizer"],
        "folder": PLAYED if played else FOLDERS.get((dim, channels)),
    }


def _command(report: Mapping[str, Any], recipes: Sequence[str]) -> str:
    """How the file is given to `millstream run`."""
    option = {
        "transformer": "--checkpoint",
        "adapter": "--lora",
        "tiny decoder": "--decoder",
    }.get(report["kind"])
    if option is None or not report.get("runs", True):
        return ""
    recipe = recipes[0] if recipes else "RECIPE"
    words = ["--model", report.get("folder") or "FOLDER", option, report["file"], "--recipe", recipe]
    start = "--image start.png" if report.get("played") else '"a corgi surfs"'
    return f"millstream run {start} {shlex.join(words)}"


def as_text(report: Mapping[str, Any]) -> str:
    """The report of `describe_file` for people."""
    count = report["parameters"]
    size = f"{count / 1e9:.2f} billion parameters" if count >= 1e7 else f"{count:,} parameters"
    stored = f"{report['bytes'] / 1e9:.2f} GB in {' and '.join(report['dtypes'])}"
    kind = report["kind"]
    lines = [f"{report['file']}: {_kind(report)}, {size}, {stored}"]
    if kind in ("autoencoder", "text encoder"):
        part = "vae" if kind == "autoencoder" else "text_encoder"
        return "\n".join([*lines, f"it is one part of a model: keep it in the model's folder, as {part}/"])
    if not report.get("runs", True):
        return "\n".join([*lines, "it takes a picture beside the noise, is not causal, and is not run here"])
    if report["recipes"]:
        others = f" (or {', '.join(report['recipes'][1:])})" if len(report["recipes"]) > 1 else ""
        lines.append(f"run by recipe {report['recipes'][0]}{others}")
    elif kind == "transformer":
        lines.append(
            "its form does not tell by which recipe it is run; Wan as released is not causal and makes no stream"
        )
    if report.get("missing"):
        example = f", such as {report['folder']}" if report.get("folder") else ""
        lines.append(f"to run it takes {', '.join(report['missing'])} from a model's folder or repository{example}:")
    return "\n".join([*lines, f"  {report['command']}"])


def _kind(report: Mapping[str, Any]) -> str:
    if report["kind"] == "adapter":
        return f"an adapter (lora) of {report['layers']} layers and rank {', '.join(map(str, report['ranks']))}"
    if report["kind"] != "transformer":
        return f"{'an' if report['kind'] == 'autoencoder' else 'a'} {report['kind']}"
    what = "a model that is played" if report["played"] else "a transformer"
    return f"{what}, {report['dialect']} weights, {report['blocks']} blocks {report['width']} wide"
