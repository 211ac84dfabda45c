"""What a model will need before it is loaded, read from its configuration and the headers of its weights."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..video import VIDEO_MODELS
from ..world import shipped_models, world_dtype

PARTS = {"prompts": "prompts", "codec": "codec", "working": "working memory, about"}
PIXELS_PER_TOKEN = 256  # 8 x 8 by the codec, 2 x 2 by the patches
MAX_HEADER = 64 << 20
SCALE = ".scale"  # belongs to a packed weight, and is gone once that is unpacked


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes that a model takes.

    Attributes:
        model: its name.
        weights: component -> bytes in memory, which for packed weights is more than on disk.
        cache: the frames that one session remembers.
        free: bytes free where the model would run.
        device: where that is, in words.
        note: what the plan can't know, or "".
    """

    model: str
    weights: dict[str, int]
    cache: int
    free: int
    device: str
    note: str = ""

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.cache

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total, "fits": self.total <= self.free}


def memory_plan(model: str, recipe: str = "", preset: str = "") -> MemoryPlan:
    """The plan for a shipped model, a folder, or a repository that has been downloaded. Loads and downloads nothing.

    Args:
        recipe, preset: how it would be loaded; "" is the model's own way.
    """
    device, free = free_memory()
    folder = _folder(model)
    if folder is None:
        note = "Not downloaded yet, so its size is not known before the first load."
        return MemoryPlan(model, {}, 0, free, device, note)
    kind = _read(folder / "model_index.json").get("_class_name")
    if recipe or (kind[-1] if isinstance(kind, list) else kind) in VIDEO_MODELS:
        return _video_plan(model, folder, recipe, preset, device, free)
    import torch

    each = world_dtype(preset or None, "cuda" if torch.cuda.is_available() else "cpu").itemsize
    weights = {part: each * size for part in _components(folder) if (size := _numbers(folder / part))}
    cache = each * _cache_numbers(folder)
    note = "" if cache else "What its frames take in memory is decided when it loads."
    return MemoryPlan(model, weights, cache, free, device, note)


def _video_plan(model: str, folder: Path, recipe: str, preset: str, device: str, free: int) -> MemoryPlan:
    """Counted by the pipeline itself, from the headers of its files."""
    import torch

    from ...pipelines.memory import plan_for

    chosen: dict[str, Any] = {"recipe": recipe or None, "preset": preset or None}
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    try:
        _, plan = plan_for(folder, torch_dtype=dtype, **{name: value for name, value in chosen.items() if value})
    except (ValueError, OSError) as error:
        return MemoryPlan(model, {}, 0, free, device, f"It can't be loaded this way: {error}")
    rest = {words: size for part, words in PARTS.items() if (size := getattr(plan, part))}
    if plan.with_inputs > plan.total:
        rest["pictures that come in"] = plan.with_inputs - plan.total
    return MemoryPlan(model, plan.weights | rest, plan.kv, free, device)


def free_memory() -> tuple[str, int]:
    """Where a model would run by default, in words, and the bytes that are free there."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return "this machine's memory", int(line.split()[1]) * 1024
    import psutil

    return "this machine's memory", psutil.virtual_memory().available


def _folder(model: str) -> Path | None:
    shipped = shipped_models()
    if model in shipped:
        return shipped[model]
    path = Path(model).expanduser()
    if (path / "model_index.json").is_file():
        return path
    from huggingface_hub import try_to_load_from_cache

    if model.count("/") != 1:
        return None
    found = try_to_load_from_cache(model, "model_index.json")
    return Path(found).parent if isinstance(found, (str, os.PathLike)) else None


def _components(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _numbers(folder: Path) -> int:
    return sum(_numbers_in(path) for path in sorted(folder.glob("*.safetensors")))


def _numbers_in(path: Path) -> int:
    """How many numbers a safetensors file holds; packed or not, each becomes a float once loaded."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER:
            raise ValueError(f"{path.name} is not a safetensors file: its header would be {length:,} bytes")
        header = json.loads(file.read(length))
    numbers = 0
    for name, entry in header.items():
        if name != "__metadata__" and not name.endswith(SCALE):
            count = 1
            for side in entry["shape"]:
                count *= side
            numbers += count
    return numbers


def _cache_numbers(folder: Path) -> int:
    """Of the keys and values of every remembered frame, for a world; 0 where the folder does not say."""
    index, config = _read(folder / "model_index.json"), _read(folder / "transformer" / "config.json")
    if not {"window", "size"} <= index.keys() or "num_layers" not in config:
        return 0
    height, width = index["size"]
    tokens = height * width // PIXELS_PER_TOKEN
    channels = config["num_attention_heads"] * config["attention_head_dim"]
    return 2 * config["num_layers"] * index["window"] * tokens * channels


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
