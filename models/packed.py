"""Weights on disk in a quarter of the room: int8 with one scale per output channel.

The stock loader would turn the integers into floats and drop the scales, so packed models read their own files; what is
in memory afterwards is an ordinary model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import Self

FILE = "diffusion_pytorch_model.safetensors"
FORMAT = {"packed": "int8 per output channel", "format": "pt"}
SCALE = ".scale"
SMALLEST = 4096  # tensors with fewer elements keep half precision: they weigh nothing and often matter most


class PackedModelMixin(ModelMixin):
    """A `ModelMixin` that also saves and loads packed weights. `from_pretrained` tells the two apart by content."""

    def save_packed(self, directory: str | Path) -> None:
        """Write `config.json` and packed weights into `directory`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {name: value for name, value in json.loads(self.to_json_string()).items() if name != "_name_or_path"}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors: dict[str, Tensor] = {}
        for name, value in self.state_dict().items():
            value = value.detach().cpu()
            if value.is_floating_point() and value.ndim >= 2 and value.numel() >= SMALLEST:
                tensors[name], tensors[name + SCALE] = pack(value)
            else:
                tensors[name] = value.half() if value.is_floating_point() else value
        save_file({name: value.contiguous() for name, value in tensors.items()}, directory / FILE, metadata=FORMAT)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a folder or a repository; see diffusers for the arguments. Only safetensors are read, never a pickle.

        Raises:
            OSError: there is no such folder or file.
            ValueError: the weights are damaged, or another model's (the stock loader would draw what is missing).
        """
        path = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "") / FILE
        if path.is_file() and is_packed(path):
            return cls._from_packed(path, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"use_safetensors": True, "output_loading_info": True}
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model, info = loaded
        _check_names(cls, pretrained_model_name_or_path, info["missing_keys"], ())
        return loaded if wants_info else model

    @classmethod
    def _from_packed(cls, path: Path, kwargs: dict[str, Any]) -> Self:
        config = path.with_name("config.json")
        if not config.is_file():
            raise FileNotFoundError(f"{path} has no config.json beside it; fetch the whole folder again")
        config_class: Any = cls  # every packed model is a ConfigMixin too
        model = config_class.from_config(json.loads(config.read_text(encoding="utf-8")))
        stored, wanted = unpack_file(path), model.state_dict()
        misfits = {name for name in stored.keys() & wanted.keys() if stored[name].shape != wanted[name].shape}
        _check_names(cls, path, wanted.keys() - stored.keys() | misfits, stored.keys() - wanted.keys())
        model.load_state_dict(stored)
        model.register_to_config(_name_or_path=str(path.parent))
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or torch.float32
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point() and not set(name.split(".")) & set(cls._keep_in_fp32_modules or ()):
                value.data = value.data.to(dtype)
        return model.eval()


def _check_names(cls: type, where: str | Path, missing: Iterable[str], unknown: Iterable[str]) -> None:
    missing, unknown = sorted(missing), sorted(unknown)
    if missing or unknown:
        raise ValueError(
            f"the weights in {where} are not a {cls.__name__} of its config: {len(missing)} missing or of "
            f"another shape ({', '.join(missing[:3])}), {len(unknown)} unknown ({', '.join(unknown[:3])})"
        )


def pack(value: Tensor) -> tuple[Tensor, Tensor]:
    """Integers in -127..127 and their scales, float32 [channels, 1, ...]: value is about integers * scale."""
    flat = value.float().flatten(1)
    scale = flat.abs().amax(dim=1).clamp_min(1e-12).div(127).reshape(-1, *[1] * (value.ndim - 1))
    return (value.float() / scale).round().to(torch.int8), scale


def is_packed(path: Path) -> bool:
    """Does this safetensors file say that it is packed? Raises `ValueError` if it cannot be read at all."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("packed") == FORMAT["packed"]
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from error


def unpack_file(path: Path) -> dict[str, Tensor]:
    """The state dict that a packed file stands for, float32."""
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    state = {}
    for name, value in stored.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in stored:
            continue
        if name + SCALE in stored:
            value = value.float() * stored[name + SCALE]
        state[name] = value.float() if value.is_floating_point() else value
    return state
