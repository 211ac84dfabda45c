"""Low-rank adapters: W + scale (alpha / r) B A, merged into the weights, so that a step costs what it did without."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..quantized import QuantizedLinear, is_plain
from .files import read_json, read_metadata, weight_file
from .names import transformer_name, unwrapped

PAIR = re.compile(r"(.*)\.(?:lora_(A|B|down|up))(?:\.[^.]+)?\.weight")
KOHYA = re.compile(r"lora_unet_blocks_(\d+)_(self_attn|cross_attn|ffn)_(\w+)")  # as musubi-tuner names layers
LARGEST = torch.finfo(torch.float32).max
HALVES = {"A": "A", "B": "B", "down": "A", "up": "B"}


def is_lora(names: Mapping[str, object]) -> bool:
    """Are these an adapter's names?"""
    return any(PAIR.fullmatch(name) for name in names)


def lora_settings(source: str | Path) -> dict[str, Any]:
    """PEFT's settings of an adapter: in its header, as diffusers writes them, or in `adapter_config.json` beside it."""
    file = weight_file(source)
    told = read_metadata(file).get("lora_adapter_metadata")
    if told is None:
        return read_json(file.parent / "adapter_config.json") or {}
    try:
        settings = json.loads(told)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is damaged: the lora_adapter_metadata in its header is no JSON object")
    part = "transformer."
    own = {name.removeprefix(part): value for name, value in settings.items() if name.startswith(part)}
    return own or settings


def lora_pairs(stored: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """An adapter's tensors as `LAYER.lora_A.weight`, `LAYER.lora_B.weight` and `LAYER.alpha`, in diffusers' words.

    `settings` are PEFT's: they give the alphas of layers that have none in the file.

    Raises:
        ValueError: a tensor is no part of a pair, half of a pair is missing, a layer is there twice, or the settings
            are not those of these weights.
    """
    pairs: dict[str, Tensor] = {}
    published: dict[str, str] = {}  # names of layers in the words of the file
    strange, twice = [], []
    for name, tensor in stored.items():
        match = PAIR.fullmatch(name)
        if match is None and not name.endswith(".alpha"):
            strange.append(name)
            continue
        there = name.removesuffix(".alpha") if match is None else match[1]
        half = "alpha" if match is None else f"lora_{HALVES[match[2]]}.weight"
        layer = _layer(there)
        published[layer] = there
        if f"{layer}.{half}" in pairs:
            twice.append(layer)
        pairs[f"{layer}.{half}"] = tensor
    if twice:
        raise ValueError(
            f"the adapter has {len(set(twice))} layers twice ({', '.join(sorted(set(twice))[:3])}); keep one adapter "
            "in a file"
        )
    halves = {name.removesuffix(".weight") for name in pairs if name.endswith(".weight")}
    layers = set(published)
    alone = sorted(layer for layer in layers if not {f"{layer}.lora_A", f"{layer}.lora_B"} <= halves)
    if strange or alone:
        raise ValueError(
            f"not an adapter of low-rank pairs: {len(strange)} other tensors ({', '.join(sorted(strange)[:3])}), "
            f"{len(alone)} layers with half a pair ({', '.join(alone[:3])})"
        )
    settings = settings or {}
    if settings.get("use_dora"):
        raise ValueError(
            "the adapter's settings say DoRA, which is more than low-rank pairs; train it without use_dora"
        )
    for layer, there in published.items():
        down = pairs[f"{layer}.lora_A.weight"]
        alpha = None if f"{layer}.alpha" in pairs or down.ndim != 2 else _alpha(settings, there, down.shape[0])
        if alpha is not None:
            pairs[f"{layer}.alpha"] = torch.tensor(alpha)
    return pairs


def _alpha(settings: Mapping[str, Any], layer: str, rank: int) -> float | None:
    """The alpha of a layer by PEFT's settings, so that alpha / rank is its strength; None where they do not say."""
    alpha = _setting(settings, "lora_alpha", "alpha_pattern", layer)
    wanted = _setting(settings, "r", "rank_pattern", layer)
    if wanted is not None and wanted != rank:
        raise ValueError(
            f"the adapter's settings say rank {wanted:g} for {layer}, and its weights have {rank}: take the "
            "adapter_config.json that belongs to these weights"
        )
    if alpha is None:
        return None
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


def _setting(settings: Mapping[str, Any], name: str, pattern: str, layer: str) -> float | None:
    """A number for a layer: the first of the `pattern` whose key the layer's name ends with, or that of all layers."""
    special = settings.get(pattern) or {}
    if not isinstance(special, dict):
        raise ValueError(f"the adapter's {pattern} must be numbers by names of layers, got a {type(special).__name__}")
    for key, value in special.items():
        plain = unwrapped(key.removeprefix("^").removesuffix("$"))
        if not re.fullmatch(r"[\w.]+", plain):
            raise ValueError(
                f"the adapter's {pattern} has the key {key!r}, and only names of layers are understood there; save "
                "the adapter again with one alpha, or with a tensor LAYER.alpha for each layer"
            )
        if layer == plain or (layer.endswith(f".{plain}") and not key.startswith("^")):
            return _number(value, pattern)
    value = settings.get(name)
    return None if value is None else _number(value, name)


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise ValueError(f"the adapter's {name} must be a number, got {value!r}")
    return float(value)


def _layer(name: str) -> str:
    kohya = KOHYA.fullmatch(name)
    name = name if kohya is None else "blocks.{}.{}.{}".format(*kohya.groups())
    return transformer_name(name + ".").removesuffix(".")


@torch.no_grad()
def merge_lora(model: nn.Module, adapter: Mapping[str, Tensor], *, scale: float = 1.0) -> None:
    """Add an adapter to the weights of `model`, in float32, rounded once; weights in 8 bits are quantised anew.

    Args:
        model: its linear layers bear the adapter's names.
        adapter: the `weights` of a `lora` checkpoint.
        scale: strength; 1 as it was trained, 0 none.

    Raises:
        ValueError: the adapter has layers that the model lacks, or of another size; its halves do not fit together; a
            number is not finite. Nothing is changed then.
    """
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise ValueError(f"the strength of an adapter must be a finite number, got {scale!r}")
    modules = dict(model.named_modules())
    layers = sorted({name.rpartition(".lora_")[0] for name in adapter if ".lora_" in name})
    changes = {}
    misfits = []
    for layer in layers:
        down, up = _halves(adapter, layer)
        module = modules.get(layer)
        if not isinstance(module, (nn.Linear, QuantizedLinear)) or tuple(module.weight.shape) != (
            up.shape[0],
            down.shape[1],
        ):
            misfits.append(f"{layer} ({up.shape[0]} x {down.shape[1]})")
            continue
        if not is_plain(module) and not isinstance(module, QuantizedLinear):
            raise ValueError(
                f"{layer} was quantised by another library, and no adapter can be merged into it; give lora= when "
                "loading, which merges before weights are quantised"
            )
        changes[layer] = (module, down, up, _strength(adapter, layer, scale))
    if misfits:
        raise ValueError(
            f"the adapter belongs to another model: {len(misfits)} of its {len(layers)} layers are missing here or of "
            f"another size: {', '.join(misfits[:4])}"
        )
    for module, down, up, strength in changes.values():
        weight = module.weight
        if weight.is_meta:
            continue
        delta = up.to(weight.device, torch.float32) @ down.to(weight.device, torch.float32)
        if isinstance(module, QuantizedLinear):
            module.add(strength * delta)
        else:
            weight.copy_(weight.float().add_(delta, alpha=strength))


def _halves(adapter: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of a layer; ValueError if they are no such pair of finite numbers."""
    down, up = (adapter.get(f"{layer}.lora_{half}.weight") for half in "AB")
    if down is None or up is None:
        raise ValueError(f"the adapter has half a pair only for {layer}")
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise ValueError(f"the adapter is damaged: {layer} needs matrices (r, in) and (out, r), and has {shapes}")
    if not all(half.is_floating_point() and (half.is_meta or half.float().isfinite().all()) for half in (down, up)):
        raise ValueError(f"the adapter is damaged: the weights of {layer} are not all finite numbers")
    return down, up


def _strength(adapter: Mapping[str, Tensor], layer: str, scale: float) -> float:
    alpha = adapter.get(f"{layer}.alpha")
    if alpha is None or alpha.is_meta:
        return scale
    if alpha.numel() != 1 or not math.isfinite(float(alpha)):
        raise ValueError(f"the adapter is damaged: the alpha of {layer} must be one finite number")
    return scale * float(alpha) / adapter[f"{layer}.lora_A.weight"].shape[0]
