"""Reading weight files, told apart by their first bytes. Nothing that a file contains is ever run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

INDEX = "*.safetensors.index.json"
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


def read_weights(source: str | Path, *, headers_only: bool = False) -> dict[str, Any]:
    """What a file or a folder of weights holds, as stored: tensors by name, possibly nested in dictionaries.

    Tensors are mapped from the disk where the format allows it, so that nothing is read before it is used; with
    `headers_only` they are on the meta device, shapes and types alone.

    Raises:
        FileNotFoundError: there is no such file, or no weights in the folder.
        ValueError: the file is damaged, of an unknown kind, or holds more than tensors; the folder holds several files.
    """
    source = Path(source).expanduser()
    if source.is_dir():
        return _read_folder(source, headers_only)
    if not source.is_file():
        raise FileNotFoundError(f"there is no weight file {source}")
    with source.open("rb") as file:
        start = file.read(64)
    if start[8:9] == b"{":
        return _read_safetensors(source, headers_only)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return _read_torch(source, headers_only, mapped=start[:2] == b"PK")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{source} is only a Git LFS pointer; fetch the file itself with: git lfs pull")
    raise ValueError(f"{source} is neither a safetensors nor a PyTorch file; fetch it again")


def _read_folder(folder: Path, headers_only: bool) -> dict[str, Any]:
    indices = sorted(folder.glob(INDEX))
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".pt", ".pth", ".bin"))
    if len(indices) == 1:
        return _read_shards(indices[0], headers_only)
    if len(files) == 1 and not indices:
        return read_weights(files[0], headers_only=headers_only)
    if not files:
        raise FileNotFoundError(f"there are no weights in the folder {folder}")
    found = ", ".join(path.name for path in [*indices, *files][:6])
    raise ValueError(f"{folder} holds several weight files ({found}); name the one to load")


def _read_shards(index: Path, headers_only: bool) -> dict[str, Any]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is no index of weight files; fetch it again") from None
    if outside:
        raise ValueError(f"{index} points outside its folder: {outside[0]}")
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
                return {
                    name: torch.empty(each.get_shape(), dtype=DTYPES[each.get_dtype()], device="meta")
                    for name, each in slices.items()
                }
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or was cut short ({error}); fetch it again") from None


def _read_torch(path: Path, headers_only: bool, *, mapped: bool) -> dict[str, Any]:
    try:
        place = "meta" if headers_only else "cpu"
        stored = torch.load(path, map_location=place, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} holds more than tensors, which could run code, and is refused ({reason}); take safetensors, "
            "or save its tensors again from a place you trust"
        ) from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged or was cut short ({str(error).splitlines()[0]}); fetch it again") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, not tensors by name")
    return stored
