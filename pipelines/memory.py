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

WORKING = 4  # tensors as large as the widest layer's input that are alive at once in a codec


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes.

    Attributes:
        weights: of each part.
        host: those of parts that stay in the host's memory.
        kv: keys and values of every row; there are 1, 2, 4, ... rows, as many as the streams need or the next more.
        prompts: keys and values of the prompts, of every row.
        codec: what the decoder keeps of every stream, and the encoder where the recipe encodes what was drawn.
        inputs: what the encoder takes besides, by what comes in: `image` and `video`. Not in `total`.
        growing: rows that are still there while they move into twice as many, as a stream is opened.
        working: what comes and goes while a chunk is decoded; an estimate, the only one here.
    """

    weights: dict[str, int]
    kv: int
    prompts: int
    codec: int
    working: int
    host: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    growing: int = 0

    @property
    def total(self) -> int:
        """All of it for streams from prompts alone, but for what stays on the host."""
        most = max(self.working, self.growing)  # never at once
        return sum(self.weights.values()) + self.kv + self.prompts + self.codec + most

    @property
    def with_inputs(self) -> int:
        """All of it where a picture or a video comes in, whichever takes more."""
        return self.total + max(self.inputs.values(), default=0)

    @property
    def without_text_encoder(self) -> int:
        """What is left once the prompts are read and the text encoder is dropped."""
        return self.total - self.weights.get("text_encoder", 0)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        sums = {name: getattr(self, name) for name in ("total", "with_inputs", "without_text_encoder")}
        return asdict(self) | sums

    def as_text(self) -> str:
        """For people."""
        rows = [*self.weights.items(), ("keys and values", self.kv), ("prompts", self.prompts)]
        rows += [("codec state", self.codec), ("working (about)", self.working)]
        rows += [("while streams are opened", self.growing)] if self.growing > self.working else []
        rows += [
            ("in all", self.total),
            *((f"more with {name}=", count) for name, count in self.inputs.items() if count),
        ]
        rows += [(f"{name}, on the host", count) for name, count in self.host.items()]
        if "text_encoder" in self.weights:
            rows.append(("after drop_text_encoder()", self.without_text_encoder))
        return "\n".join(f"{name:28}{count / 1e9:7.2f} GB" for name, count in rows)


def memory_plan(pipe: VideoPipeline, streams: int = 1) -> MemoryPlan:
    """What `pipe` takes at its size with so many streams open at once."""
    model, config = pipe.transformer, pipe.transformer.config
    needed = pipe.recipe.rows * streams
    rows = 1 << (needed - 1).bit_length()  # as `RowArena` doubles
    one, cache = (make_cache(model, **pipe.cache_shape(count), device="meta").bytes for count in (1, rows))
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    prompt = 2 * config["num_layers"] * pipe.prompt_length * dim * model.dtype.itemsize
    kept, widest = pipe.codec.memory(*pipe.size)
    seen, scratch = pipe.encoder.memory(*pipe.size)
    weights = {name: weight_bytes(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    staying = {"text_encoder"} & weights.keys() if pipe.preset.text_on_host else set()
    return MemoryPlan(
        weights={name: count for name, count in weights.items() if name not in staying},
        host={name: weights[name] for name in staying},
        kv=cache,
        prompts=rows * prompt,
        codec=kept * streams + (seen + scratch if pipe.recipe.overlap else 0),
        inputs=_inputs(pipe, seen * streams, seen, scratch),
        growing=(rows // 2) * (one + prompt) + one if rows > 1 else 0,
        working=max(WORKING * widest, seen + WORKING * scratch if pipe.is_game else 0),
    )


def _inputs(pipe: VideoPipeline, videos: int, still: int, scratch: int) -> dict[str, int]:
    """What the encoder takes where pictures come in, besides what every stream takes."""
    if pipe.is_game:
        return {}  # the picture that a world begins with is encoded in what is working memory later
    if pipe.recipe.overlap:
        return {"image": 0, "video": videos}
    image = {"image": still + scratch}
    return image if pipe.recipe.plan == "triangle" else image | {"video": videos + scratch}


def plan_for(source: str | Path, *, streams: int = 1, **arguments: Any) -> tuple[VideoPipeline, MemoryPlan]:
    """The plan of a pipeline that is not loaded, with so many streams open at once.

    The other arguments are those of `VideoPipeline.from_pretrained`.

    Returns:
        The pipeline on the meta device, to be asked what it is, and its plan.

    Raises:
        FileNotFoundError, ValueError: as `VideoPipeline.from_pretrained` would.
    """
    from .video import VideoPipeline

    pipe = VideoPipeline.from_pretrained(source, **arguments, headers_only=True)
    return pipe, memory_plan(pipe, streams)


def weight_bytes(part: nn.Module) -> int:
    """Of its parameters and buffers, those that it shares counted once."""
    unique: dict[int, torch.Tensor] = {id(each): each for each in [*part.parameters(), *part.buffers()]}
    return sum(each.numel() * each.element_size() for each in unique.values())
