"""Reading weight files, told apart by their first bytes. Nothing that a file contains is ever run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "*.safetensors.index.json"
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


def read_weights(source: str | Path, *, headers_only: bool = False) -> dict[str, Any]:
    """What weights hold, as stored: tensors by name, possibly nested in dictionaries.

    `source` is a file, an index of shards, or a folder with one of either. Tensors are mapped from the disk where the
    format allows it, so that nothing is read before it is used; with `headers_only` they are on the meta device, shapes
    and types alone.

    Raises:
        FileNotFoundError: there is no such file, or no weights in the folder.
        ValueError: the file is damaged, of an unknown kind, or holds more than tensors; the folder holds several files.
    """
    source = Path(source).expanduser()
    source = weight_file(source)
    if is_index(source):
        return _read_shards(source, headers_only)
    with source.open("rb") as file:
        start = file.read(64)
    if start[8:9] == b"{":
        return _read_safetensors(source, headers_only)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return _read_torch(source, headers_only, mapped=start[:2] == b"PK")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{source} is only a Git LFS pointer; fetch the file itself with: git lfs pull")
    raise ValueError(f"{source} is neither a safetensors nor a PyTorch file; fetch it again")


def weight_file(source: str | Path) -> Path:
    """The file or index that is read for `source`. FileNotFoundError, ValueError as `read_weights`."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if not folder.is_file():
            raise FileNotFoundError(f"there is no weight file {folder}")
        return folder
    indices = sorted(folder.glob(INDEX))
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".pt", ".pth", ".bin"))
    if len(indices) == 1:
        return indices[0]
    if len(files) == 1 and not indices:
        return files[0]
    if not files:
        raise FileNotFoundError(f"there are no weights in the folder {folder}")
    found = ", ".join(path.name for path in [*indices, *files][:6])
    raise ValueError(f"{folder} holds several weight files ({found}); name the one to load")


def adapter_file(source: str | Path, weight_name: str | None = None) -> Path:
    """The file or folder of an adapter on this machine. Nothing is fetched.

    Raises:
        FileNotFoundError, ValueError: there is none, or no such file in it.
    """
    place = Path(source).expanduser()
    if not place.exists():
        place = _fetched(str(source))
    if weight_name is None:
        return place
    if place.is_file():
        raise ValueError(f"weight_name is for folders, and {place} is a file; leave weight_name={weight_name!r} out")
    if not (place / weight_name).is_file():
        inside = ", ".join(sorted(path.name for path in place.iterdir() if path.is_file())[:6]) or "no files"
        raise FileNotFoundError(f"there is no file {weight_name!r} in {place}, which holds {inside}")
    return place / weight_name


def _fetched(name: str) -> Path:
    """Where a repository of the Hugging Face hub lies that was fetched before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise FileNotFoundError(
            f"there is no file or folder {name}, nor was a repository of that name fetched before; adapters are not "
            f"fetched silently: hf download {name}, or name a file"
        ) from None


def is_index(path: Path) -> bool:
    """Is this the name of an index of shards?"""
    return path.match(INDEX)


def read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, from an index of shards; ValueError if it is none, or points out of its folder."""
    places = (read_json(index) or {}).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} is no index of weight files; fetch it again")
    outside = [name for name in places.values() if Path(name).name != name]
    if outside:
        raise ValueError(f"{index} points outside its folder: {outside[0]}")
    return places


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file. ValueError if it is damaged or holds something else."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}); fetch it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not settings by name; fetch it again")
    return found


def named_tensors(stored: Mapping[Any, Any], source: str | Path) -> dict[str, Tensor]:
    """The tensors in a dictionary that was read from `source`. ValueError if one has a name that is no text."""
    tensors = {name: value for name, value in stored.items() if isinstance(value, Tensor)}
    strange = [name for name in tensors if not isinstance(name, str)]
    if strange:
        raise ValueError(f"{source} is no checkpoint: {strange[0]!r} is not the name of a tensor")
    return tensors


def _read_shards(index: Path, headers_only: bool) -> dict[str, Any]:
    names = sorted(set(read_index(index).values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks {len(missing)} of {len(names)} files: {', '.join(missing)}")
    weights: dict[str, Any] = {}
    for name in names:
        weights |= _read_safetensors(index.parent / name, headers_only)
    return weights


def _read_safetensors(path: Path, headers_only: bool) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            if headers_only:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
                strange = {each.get_dtype() for each in slices.values()} - DTYPES.keys()
                if strange:
                    raise ValueError(f"{path} has numbers of an unknown kind: {', '.join(sorted(strange))}")
                return {
                    name: torch.empty(each.get_shape(), dtype=DTYPES[each.get_dtype()], device="meta")
                    for name, each in slices.items()
                }
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or was cut short ({error}); fetch it again") from None


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; nothing for files of another kind."""
    with path.open("rb") as file:
        if file.read(9)[8:] != b"{":
            return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or was cut short ({error}); fetch it again") from None


def _read_torch(path: Path, headers_only: bool, *, mapped: bool) -> dict[str, Any]:
    try:
        place = "meta" if headers_only else "cpu"
        stored = torch.load(path, map_location=place, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, which could run code, and is refused ({first_line(error)}); take "
            "safetensors, or save its tensors again from a place you trust"
        ) from None
    except Exception as error:  # a damaged pickle may fail in any way
        raise ValueError(f"{path} is damaged or no checkpoint: {first_line(error)}; fetch it again") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, not tensors by name")
    return stored


def first_line(error: Exception) -> str:
    """What an error of another library says, without what it says at length."""
    return (str(error).splitlines() or [type(error).__name__])[0]
