"""Low-rank adapters: W + scale (alpha / r) B A, merged into the weights, so that a step costs what it did without."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..quantized import QuantizedLinear
from .names import transformer_name

PAIR = re.compile(r"(.*)\.(?:lora_(A|B|down|up))(?:\.[^.]+)?\.weight")


def is_lora(names: Mapping[str, object]) -> bool:
    """Are these an adapter's names?"""
    return any(PAIR.fullmatch(name) for name in names)


def lora_pairs(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors as `LAYER.lora_A.weight`, `LAYER.lora_B.weight` and `LAYER.alpha`, in diffusers' words.

    Raises:
        ValueError: a tensor is no part of a pair, or half of a pair is missing.
    """
    pairs: dict[str, Tensor] = {}
    strange = []
    for name, tensor in stored.items():
        match = PAIR.fullmatch(name)
        if match is not None:
            half = {"down": "A", "up": "B"}.get(match[2], match[2])
            pairs[f"{_layer(match[1])}.lora_{half}.weight"] = tensor
        elif name.endswith(".alpha"):
            pairs[f"{_layer(name.removesuffix('.alpha'))}.alpha"] = tensor
        else:
            strange.append(name)
    halves = {name.removesuffix(".weight") for name in pairs if name.endswith(".weight")}
    layers = {half.rpartition(".")[0] for half in halves}
    alone = sorted(layer for layer in layers if not {f"{layer}.lora_A", f"{layer}.lora_B"} <= halves)
    if strange or alone:
        raise ValueError(
            f"not an adapter of low-rank pairs: {len(strange)} other tensors ({', '.join(sorted(strange)[:3])}), "
            f"{len(alone)} layers with half a pair ({', '.join(alone[:3])})"
        )
    return pairs


def _layer(name: str) -> str:
    return transformer_name(name + ".").removesuffix(".")


@torch.no_grad()
def merge_lora(model: nn.Module, adapter: Mapping[str, Tensor], *, scale: float = 1.0) -> None:
    """Add an adapter to the weights of `model`, in float32, rounded once; weights in 8 bits are quantised anew.

    Args:
        model: its linear layers bear the adapter's names.
        adapter: the `weights` of a `lora` checkpoint.
        scale: strength; 1 as it was trained, 0 none.

    Raises:
        ValueError: the adapter has layers that the model lacks, or of another size. Nothing is changed then.
    """
    modules = dict(model.named_modules())
    layers = sorted({name.rpartition(".lora_")[0] for name in adapter if ".lora_" in name})
    changes = {}
    misfits = []
    for layer in layers:
        down, up = (adapter[f"{layer}.lora_{half}.weight"] for half in "AB")
        module = modules.get(layer)
        if not isinstance(module, (nn.Linear, QuantizedLinear)) or tuple(module.weight.shape) != (
            up.shape[0],
            down.shape[1],
        ):
            misfits.append(f"{layer} ({up.shape[0]} x {down.shape[1]})")
            continue
        rank = down.shape[0]
        alpha = adapter.get(f"{layer}.alpha")
        changes[layer] = (module, down, up, alpha, rank)
    if misfits:
        raise ValueError(
            f"the adapter belongs to another model: {len(misfits)} of its {len(layers)} layers are missing here or of "
            f"another size: {', '.join(misfits[:4])}"
        )
    for module, down, up, alpha, rank in changes.values():
        weight = module.weight
        if weight.is_meta:
            continue
        strength = scale * (1.0 if alpha is None else float(alpha) / rank)
        delta = up.to(weight.device, torch.float32) @ down.to(weight.device, torch.float32)
        if isinstance(module, QuantizedLinear):
            module.add(strength * delta)
        else:
            weight.copy_(weight.float().add_(delta, alpha=strength))
