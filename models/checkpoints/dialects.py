"""Which publication a file of weights is, told by its names; its tensors in diffusers' words.

| dialect | what is in the file |
| --- | --- |
| diffusers | `blocks.N.attn1.to_q.weight`: diffusers' own folders and files |
| original | `blocks.N.self_attn.q.weight`: Wan as released |
| self_forcing | `generator` and `generator_ema`, each `model.` + original: Self-Forcing and its heirs |
| causvid | `generator` alone: CausVid, LongLive's base |
| streamdiffusion_v2 | `state_dict` or `model` around original names: StreamDiffusionV2 and others that were trained |
| krea | a flat file of `model.` + original: Krea Realtime |
| lora | `lora_A` and `lora_B` pairs, bare or under `generator_lora`: LongLive's adapter |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from .files import adapter_file, named_tensors, read_weights
from .lora import is_lora, lora_pairs, lora_settings
from .names import transformer_name, unwrapped

Dialect = Literal["diffusers", "original", "self_forcing", "causvid", "streamdiffusion_v2", "krea", "lora"]

# Where a training run keeps the weights that are meant to be used, best first.
NESTS = ("generator_ema", "generator", "generator_lora", "model", "state_dict", "module")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A transformer's weights.

    Attributes:
        dialect: how they were published.
        weights: tensors by diffusers' names; for `lora` those of the adapter, `NAME.lora_A.weight` and so on.
    """

    dialect: Dialect
    weights: dict[str, Tensor]


def open_checkpoint(source: str | Path, *, ema: bool = True, headers_only: bool = False) -> Checkpoint:
    """Read the weights of a transformer, or an adapter for one, in whatever dialect they are.

    Args:
        source: a file, or a folder with one file or one index of shards.
        ema: take the averaged weights where there are two sets, as the published code does.
        headers_only: shapes alone, on the meta device.

    Raises:
        FileNotFoundError, ValueError: as `files.read_weights`; ValueError too where no transformer is recognised.
    """
    return recognised(read_weights(source, headers_only=headers_only), source, ema=ema)


def open_adapter(
    source: str | Path | Mapping[str, Any], *, weight_name: str | None = None, headers_only: bool = False
) -> Checkpoint:
    """Read an adapter for a transformer, in whatever dialect it is.

    Args:
        source: a file, a folder, a repository of the Hugging Face hub that was fetched before, or the tensors by name.
        weight_name: which file of the folder.
        headers_only: leave the tensors of files on the meta device.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `open_checkpoint`; it is no adapter, or not on this machine.
    """
    if isinstance(source, Mapping):
        strange = [name for name, value in source.items() if not isinstance(value, (Tensor, Mapping))]
        if strange or weight_name is not None:
            seen = f"weight_name {weight_name!r}" if not strange else type(source[strange[0]]).__name__
            raise TypeError(f"an adapter given as a dictionary holds tensors by name and nothing else, got {seen}")
        found, source = recognised(source, "the adapter", settings={}), "the adapter"
    else:
        source = adapter_file(source, weight_name)
        found = open_checkpoint(source, headers_only=headers_only)
    if found.dialect != "lora":
        raise ValueError(
            f"{source} is a whole model ({found.dialect}), no adapter; give it as the model itself, or checkpoint="
        )
    return found


def recognised(
    stored: Mapping[str, Any], source: str | Path, *, ema: bool = True, settings: Mapping[str, Any] | None = None
) -> Checkpoint:
    """The checkpoint in what `read_weights` read; `settings` of an adapter are read beside it where they are None."""
    nested, way = _unnested(stored, ema)
    inside = named_tensors(nested, source)
    plain = {unwrapped(name): value for name, value in inside.items()}
    if len(plain) < len(inside):
        raise ValueError(f"{source} holds several models under one set of names; name the file of one of them")
    if is_lora(plain):
        return Checkpoint("lora", lora_pairs(plain, lora_settings(source) if settings is None else settings))
    if any(".attn1.to_q.weight" in name for name in plain):
        return Checkpoint("diffusers", plain)
    if not any(".self_attn.q.weight" in name for name in plain):
        seen = ", ".join(list(map(str, stored))[:6]) or "nothing"
        raise ValueError(
            f"{source} holds no Wan transformer: there is neither blocks.N.attn1.to_q.weight (diffusers) nor "
            f"blocks.N.self_attn.q.weight (original) in it, but {seen}"
        )
    return Checkpoint(_dialect(stored, way, inside), {transformer_name(name): tensor for name, tensor in plain.items()})


def _unnested(stored: Mapping[str, Any], ema: bool) -> tuple[Mapping[str, Any], str]:
    """The innermost dictionary of tensors, and the name it stood under ("" where it is the file itself)."""
    way, passed = "", set()
    while not any(isinstance(value, Tensor) for value in stored.values()) and id(stored) not in passed:
        passed.add(id(stored))
        nests = [name for name in NESTS if isinstance(stored.get(name), Mapping)]
        if not ema and "generator" in nests:
            nests = ["generator"]
        if not nests:
            return stored, way
        way, stored = nests[0], stored[nests[0]]
    return stored, way


def _dialect(stored: Mapping[str, Any], way: str, inside: Mapping[str, Tensor]) -> Dialect:
    if "generator_ema" in stored:
        return "self_forcing"
    if "generator" in stored:
        return "causvid"
    if way:
        return "streamdiffusion_v2"
    return "krea" if any(name.startswith("model.") for name in inside) else "original"
