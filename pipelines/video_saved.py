"""What a saved stream of video says of the pipeline that made it, and how one that does not belong is told early.

Nothing is taken and nothing is changed before all of a snapshot has been looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..streaming.types import SWITCHES, Leaves
from .recipes import as_config
from .video_actions import GREY
from .video_passes import VideoPasses
from .video_state import from_leaves, part

Sizes = tuple[int | None, ...]  # None: any number above 0
LEAST = {"heard": -1}  # of whole numbers; 0 of all others
SHAPE = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "text_dim", "image_dim")


def made_by(pipe: VideoPasses) -> str:
    """What decides how a stream goes on, besides its state: as JSON, by the words that a refusal names it with."""
    recipe, preset = as_config(pipe.recipe), asdict(pipe.preset)
    made: dict[str, Any] = {"recipe": recipe.pop("name"), "preset": preset.pop("name")}
    made["size"] = f"{pipe.size[0]} x {pipe.size[1]}"
    made["decoder"] = type(pipe.codec).__name__
    made |= {f"{name} of the transformer": pipe.transformer.config[name] for name in SHAPE}
    made["text_length"] = pipe.text_length
    made |= {f"{name} of the recipe": value for name, value in recipe.items() if name != "note"}
    made |= {f"{name} of the preset": value for name, value in preset.items()}
    return json.dumps(made)


def check_saved(pipe: VideoPasses, leaves: Leaves) -> None:
    """ValueError if `pipe` cannot go on with a stream as it would have gone on: it is another's, or damaged."""
    plain = from_leaves(leaves, None)
    _check_made(pipe, leaves)
    from_leaves(leaves, pipe.recipe.rows)
    for name, value in plain.items():
        if isinstance(value, Tensor):
            _check_tensor(name, value, _shapes(pipe)[name])
        elif not isinstance(value, str) and not (math.isfinite(value) and LEAST.get(name, 0) <= value < 2**63):
            raise ValueError(f"the snapshot is damaged: {name} is {value}")
    _check_whole(pipe, plain)
    for number in range(pipe.recipe.rows):
        memory = part(leaves, f"memory.{number}")
        if not {"k", "v", "sink_k", "count"} <= memory.keys():
            raise ValueError(f"the snapshot is damaged: row {number} of its memory is incomplete")
        for name, value in memory.items():
            whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
            if not isinstance(value, Tensor) and not whole:
                raise ValueError(f"the snapshot is damaged: {name} of row {number} of its memory is {value!r}")


def _check_made(pipe: VideoPasses, leaves: Leaves) -> None:
    told = leaves.get("made")
    if told is None:
        return  # as older snapshots have it; shapes are looked at all the same
    try:
        theirs = json.loads(told) if isinstance(told, str) else None
    except (ValueError, RecursionError):
        theirs = None
    if not isinstance(theirs, dict):
        raise ValueError("the snapshot is damaged: it does not say which pipeline made it")
    for name, ours in json.loads(made_by(pipe)).items():
        if name in theirs and theirs[name] != ours:
            raise ValueError(
                f"the snapshot was made with {name} {theirs[name]!r}, this pipeline has {ours!r}; restore it in a "
                "pipeline like the one that made it"
            )


def _shapes(pipe: VideoPasses) -> dict[str, Sizes]:
    channels, height, width = pipe.latent_size
    config, frames = pipe.transformer.config, (channels, None, height, width)
    text = (pipe.prompt_length, config["image_dim"] if pipe.is_game else config["text_dim"])
    return {
        **dict.fromkeys(("text", "origin", "target"), text),
        **dict.fromkeys(("flying", "waiting", "ahead"), frames),
        **dict.fromkeys(("corner", "seen"), (3, *pipe.size)),
        "history": (channels, pipe.recipe.window, height, width),
        "versions": (None,),
        "still": (channels, 1, height, width),
        "scene": (channels, GREY, height, width),
        "pressed": (2, len(pipe.buttons) + 2 if pipe.is_game else None),
    }


def _check_tensor(name: str, value: Tensor, sizes: Sizes) -> None:
    fits = value.ndim == len(sizes) and all(
        seen == wanted or (wanted is None and seen > 0) for seen, wanted in zip(value.shape, sizes, strict=True)
    )
    numbers = value.dtype == torch.int64 if name == "versions" else value.is_floating_point()
    if not fits or not numbers:
        wanted = ", ".join("n" if size is None else str(size) for size in sizes)
        kind = "int64" if name == "versions" else "floats"
        raise ValueError(
            f"the snapshot is damaged, or another pipeline's: {name} is {list(value.shape)} in {value.dtype}, this "
            f"pipeline's is [{wanted}] in {kind}"
        )


def _check_whole(pipe: VideoPasses, plain: Mapping[str, Any]) -> None:
    """Fields that only make sense together."""
    recipe, step, chunk = pipe.recipe, plain["step"], pipe.recipe.chunk
    most = {"staircase": 0, "triangle": recipe.units - 1, "batch": len(recipe.timesteps) - 1}[recipe.plan]
    under_way = min(most, max(0, step - (recipe.plan == "batch")))
    flying, versions, waiting = (plain.get(name) for name in ("flying", "versions", "waiting"))
    frames = 0 if flying is None else flying.shape[1]
    if frames != under_way * chunk or (0 if versions is None else len(versions)) != under_way:
        raise ValueError(f"the snapshot is damaged: {frames} frames are under way after {step} steps")
    if waiting is not None and waiting.shape[1] >= chunk:
        raise ValueError(f"the snapshot is damaged: {waiting.shape[1]} frames wait for a chunk of {chunk}")
    blending = {name: name in plain for name in ("origin", "target")}
    if blending["origin"] != blending["target"] or plain["blend"] >= max(1, recipe.blend * blending["target"]):
        raise ValueError(
            f"the snapshot is damaged: {plain['blend']} steps between two prompts, of which one is missing"
        )
    if "text" not in plain and ("prompt" in plain or plain["frame"]):
        raise ValueError("the snapshot is damaged: it lacks what its prompt is to the model")
    pending = plain.get("pending")
    if pending is not None and pending not in SWITCHES:
        raise ValueError(f"the snapshot is damaged: pending is {pending!r}")
