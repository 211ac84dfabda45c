"""How much memory a video pipeline takes, told before anything is loaded.

Nothing is estimated that can be counted: the pipeline is built on the meta device from the headers of its files, with
the same checks as a real one, and every buffer that a stream would take is asked for its size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..models.mixers import make_cache

if TYPE_CHECKING:
    from .video import VideoPipeline

WORKING = 4  # tensors as large as the widest layer's input that are alive at once while a chunk is decoded


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes.

    Attributes:
        weights: of each part.
        host: those of parts that stay in the host's memory.
        kv: keys and values of every stream.
        prompts: keys and values of the prompts.
        codec: what the decoder keeps of every stream.
        working: what comes and goes while a chunk is decoded; an estimate, the only one here.
    """

    weights: dict[str, int]
    kv: int
    prompts: int
    codec: int
    working: int
    host: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All of it, but for what stays on the host."""
        return sum(self.weights.values()) + self.kv + self.prompts + self.codec + self.working

    @property
    def without_text_encoder(self) -> int:
        """What is left once the prompts are read and the text encoder is dropped."""
        return self.total - self.weights.get("text_encoder", 0)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self) | {"total": self.total, "without_text_encoder": self.without_text_encoder}

    def as_text(self) -> str:
        """For people."""
        rows = [*self.weights.items(), ("keys and values", self.kv), ("prompts", self.prompts)]
        rows += [("codec state", self.codec), ("working (about)", self.working), ("in all", self.total)]
        rows += [(f"{name}, on the host", count) for name, count in self.host.items()]
        if "text_encoder" in self.weights:
            rows.append(("after drop_text_encoder()", self.without_text_encoder))
        return "\n".join(f"{name:28}{count / 1e9:7.2f} GB" for name, count in rows)


def memory_plan(pipe: VideoPipeline, streams: int = 1) -> MemoryPlan:
    """What `pipe` takes at its size with so many streams open at once."""
    model, config = pipe.transformer, pipe.transformer.config
    rows = pipe.recipe.rows * streams
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    cache = make_cache(model, **pipe.cache_shape(rows), device="meta")
    kept, widest = pipe.codec.memory(*pipe.size)
    weights = {name: weight_bytes(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    staying = {"text_encoder"} & weights.keys() if pipe.preset.text_on_host else set()
    return MemoryPlan(
        weights={name: count for name, count in weights.items() if name not in staying},
        host={name: weights[name] for name in staying},
        kv=cache.bytes,
        prompts=2 * config["num_layers"] * rows * pipe.prompt_length * dim * model.dtype.itemsize,
        codec=kept * streams,
        working=WORKING * widest,
    )


def plan_for(source: str | Path, **arguments: Any) -> tuple[VideoPipeline, MemoryPlan]:
    """The plan of a pipeline that is not loaded; arguments as of `VideoPipeline.from_pretrained`.

    Returns:
        The pipeline on the meta device, to be asked what it is, and its plan.

    Raises:
        FileNotFoundError, ValueError: as `VideoPipeline.from_pretrained` would.
    """
    from .video import VideoPipeline

    pipe = VideoPipeline.from_pretrained(source, **arguments, headers_only=True)
    return pipe, memory_plan(pipe)


def weight_bytes(part: nn.Module) -> int:
    """Of its parameters and buffers, those that it shares counted once."""
    unique: dict[int, torch.Tensor] = {id(each): each for each in [*part.parameters(), *part.buffers()]}
    return sum(each.numel() * each.element_size() for each in unique.values())
