"""Diffusers' own goods, in the way that streams need them: adapters, and weights that are on the GPU only when used."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from ..models.checkpoints import merge_lora, open_adapter
from .video_ahead import AheadStreamer


class ManneredStreamer(AheadStreamer):
    """The part of a video pipeline that does what users of diffusers know, where diffusers' own way does not fit."""

    _visited: torch.device | None = None  # where parts go while a clip is drawn, and come back from
    _visiting = False

    def load_lora_weights(
        self,
        source: str | Path | Mapping[str, Any],
        *,
        weight_name: str | None = None,
        scale: float = 1.0,
        **other: Any,
    ) -> None:
        """Merge an adapter into the transformer's weights, quantised or not; it can't be unloaded.

        Args:
            source: a file or folder with an adapter in any layout that `lora=` of `from_pretrained` takes, a repository
                of the Hugging Face hub that was fetched before, or the adapter's tensors by name.
            weight_name: which file of the folder or repository.
            scale: its strength. Since it is merged at once, this is what diffusers' `fuse_lora` calls lora_scale.

        Raises:
            FileNotFoundError, ValueError, TypeError: no adapter, one of another model, or an argument that is not
                known; nothing is changed then.
        """
        if other:
            raise TypeError(
                f"load_lora_weights merges an adapter at once, with its strength as scale=, and knows no "
                f"{', '.join(sorted(other))}"
            )
        adapter = open_adapter(source, weight_name=weight_name)
        with self._sharing, self.apart():
            merge_lora(self.transformer, adapter.weights, scale=scale)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the weights as diffusers does; where a device is named, they stay there from now on."""
        moved = super().to(*args, **kwargs)
        if not self._visiting and any(isinstance(place, (str, torch.device)) for place in (*args, *kwargs.values())):
            self._visited = None
        return moved

    def enable_model_cpu_offload(
        self, gpu_id: int | str | torch.device | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep weights on the host, but for those that a call needs: first the text encoder, then all the others.

        For `pipe(...)`: between two calls nothing is left on the GPU. Streams refuse it.

        Args:
            gpu_id: which GPU; the first by default.
            device: or any device.

        Raises:
            ValueError: a GPU that this machine lacks.
        """
        named = gpu_id if isinstance(gpu_id, (str, torch.device)) else device or f"cuda:{gpu_id or 0}"
        visited = torch.device(named)
        if visited.type == "cuda" and (visited.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"this machine has no {visited}; without a GPU there is nothing to offload from")
        self.to("cpu")
        self._visited = visited

    @property
    def is_away(self) -> bool:
        """Are the weights offloaded, and not here now?"""
        return self._visited is not None and not self._visiting

    @contextmanager
    def visiting(self, prompts: Iterable[str]) -> Iterator[None]:
        """Within: the weights are where `enable_model_cpu_offload` said, and these prompts were read there."""
        if self._visited is None:
            yield
            return
        reader, self._visiting = self.text_encoder, True
        try:
            if reader is not None and not self.preset.text_on_host:
                reader.to(self._visited)  # pyright: ignore[reportArgumentType]  (a stub of transformers)
            for prompt in prompts:
                self.encode_prompt(prompt)
            if reader is not None:
                reader.to("cpu")  # pyright: ignore[reportArgumentType]
            self.register_modules(text_encoder=None)
            self.to(self._visited)
            self.register_modules(text_encoder=reader)
            yield
        finally:
            self.register_modules(text_encoder=reader)
            self.to("cpu")
            self._visiting = False
            if self._visited.type == "cuda":
                gc.collect()  # recorded steps and what they hold know each other
                torch.cuda.empty_cache()

    def refuse_offload(self) -> None:
        """ValueError if the weights are not where a stream could use them."""
        from .video_output import is_offloaded

        parts: Any = self.components.values()
        if self.is_away or any(is_offloaded(part) for part in parts):
            raise ValueError(
                "a stream cannot run with model CPU offload; move the pipeline with .to(device) instead, and give the "
                "text encoder's memory back with encode_prompt(...) and drop_text_encoder()"
            )
