"""How exactly and in how much memory a pipeline draws: presets, as data beside the recipes.

A recipe says how weights are run; a preset says with what arithmetic. `exact` is the reference that the others are
measured against: `benchmarks/presets.py` prints how far each is from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..kernels.attention.float8 import float8_serves
from ..kernels.planners import FlashBlock
from ..models.quantized import DTYPES, LEAST, QuantizedLinear, quantize_linears
from ..models.transformer import CausalTransformer3DModel
from ..streaming.kv_cache import EightBits, Float8, KVCache, KVChunk, Storage

Numbers = Literal["fp8", "int8"]


@dataclass(frozen=True, slots=True)
class Preset:
    """What a pipeline may give up for speed or memory. `Preset("exact")` gives up nothing.

    Args:
        name: what it is called.
        linears: what the products of the backbone's blocks are taken in, with a scale per row of what comes in and per
            column of the weights; None leaves weights as they are.
        all_linears: every product of a block, and those of the text encoder; otherwise only those of a block that many
            rows go through: not the keys and values of the prompt.
        narrowest: products with fewer inputs or outputs than this stay as they are.
        reuse: steps of a chunk that attend to everything; at later ones attention to what lies outside the chunk is
            taken as the last of these left it, and merged with attention inside (`planners.FlashBlock`). The pass that
            remembers the chunk computes everything. 0: all steps attend to everything. -1: all but the last (-2: the
            last two), and the first two always.
        least_window: tokens in a window from which on `reuse` and `attention` are done; with fewer they gain nothing.
        attention: "fp8" multiplies queries, keys and values as float8_e4m3fn without scales, and keeps them so, on GPUs
            that have a kernel for it (`kernels.attention.float8`); elsewhere, under a model's own attention plan and
            under a recipe with spare frames it changes nothing. A plan of memory counts what is kept at full width.
            Worlds, whose recorded steps do not know where a frame lies, then keep no attention for later steps.
        kv: what keys and values are kept in, with a scale per token and head; None keeps them as they are computed.
        text_on_host: the text encoder stays in the host's memory and reads prompts there, wherever the rest moves.

    Raises:
        ValueError: numbers that are not known, or counts that are none.
    """

    name: str
    linears: Numbers | None = None
    all_linears: bool = False
    narrowest: int = LEAST
    reuse: int = 0
    least_window: int = 0
    attention: Literal["fp8"] | None = None
    kv: Numbers | None = None
    text_on_host: bool = False

    def __post_init__(self) -> None:
        for field in ("linears", "kv"):
            if getattr(self, field) not in (None, "fp8", "int8"):
                raise ValueError(f"{field} must be None, 'fp8' or 'int8', got {getattr(self, field)!r}")
        if self.attention not in (None, "fp8"):
            raise ValueError(f"attention must be None or 'fp8', got {self.attention!r}")
        if self.attention and self.kv:
            raise ValueError(f"attention='fp8' keeps keys as it multiplies them; leave out kv={self.kv!r}")
        if not isinstance(self.reuse, int):
            raise ValueError(f"reuse must be a whole number, got {self.reuse!r}")
        for field in ("narrowest", "least_window"):
            if not isinstance(getattr(self, field), int) or getattr(self, field) < 0:
                raise ValueError(f"{field} must be a whole number from 0 on, got {getattr(self, field)!r}")


PRESETS: dict[str, Preset] = {}


def add_preset(preset: Preset) -> Preset:
    """Let `preset=NAME` find it. ValueError if another one has its name."""
    if PRESETS.get(preset.name, preset) != preset:
        raise ValueError(f"there is a preset {preset.name!r} already; give this one another name")
    PRESETS[preset.name] = preset
    return preset


def find_preset(preset: Preset | str) -> Preset:
    """A preset itself, or by name. ValueError for an unknown name, with those that are known."""
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}, and add_preset adds more")
    return PRESETS[preset]


BUSY = (  # of a block
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    *("attn2.to_q", "attn2.to_out.0"),
    *("ffn.net.0.proj", "ffn.net.2"),
)


def apply_preset(preset: Preset, transformer: CausalTransformer3DModel, text_encoder: nn.Module | None = None) -> None:
    """Bring weights into the numbers of `preset`, in place. Weights that are in 8 bits already stay as they are."""
    if preset.linears is None:
        return
    dtype, least = DTYPES[preset.linears], preset.narrowest
    quantize_linears(transformer.blocks, dtype, lambda name: preset.all_linears or name.endswith(BUSY), least=least)
    if preset.all_linears and text_encoder is not None:
        quantize_linears(text_encoder, dtype, least=least)


def kv_storage(
    preset: Preset, transformer: CausalTransformer3DModel, tokens: int, *, masked: bool = False
) -> Storage | None:
    """How a `KVCache` keeps the keys and values of a window of so many tokens under `preset`; `masked` says that a part
    of what it holds is always hidden."""
    if preset.kv is not None:
        return EightBits(DTYPES[preset.kv])
    config = transformer.config
    wanted = preset.attention is not None and tokens >= preset.least_window
    plain = config["attention"] is None and not masked
    return Float8() if wanted and plain and float8_serves(transformer.device, config["attention_head_dim"]) else None


def kept_attention(preset: Preset, cache: KVCache) -> FlashBlock | None:
    """What keeps attention outside a new chunk for the chunk's later steps; None where nothing is kept."""
    wide = cache.window.frames * cache.tokens_per_frame >= preset.least_window
    return FlashBlock() if preset.reuse and wide else None


def attend_at(step: int, steps: int, preset: Preset, chunk: KVChunk, kept: FlashBlock | None) -> None:
    """Let the next pass over `chunk` attend as this step of so many (from 0) does under `preset`."""
    whole = preset.reuse if preset.reuse > 0 else max(2, steps + preset.reuse)
    saves = step >= whole - 1 and (preset.reuse > 0 or whole < steps)
    chunk.reuse = kept if saves else None
    chunk.first = step == whole - 1


def refuse_saving(preset: Preset, transformer: CausalTransformer3DModel, text_encoder: nn.Module | None = None) -> None:
    """ValueError if the weights are not what a file should hold."""
    if any(getattr(part, "hf_quantizer", None) is not None for part in (transformer, text_encoder)):
        raise ValueError(
            "the weights were quantised by quantization_config, which cannot be read back; load them without it to "
            "save them, and give it when loading"
        )
    if any(isinstance(part, QuantizedLinear) for part in transformer.modules()):
        raise ValueError(
            f"the weights of a pipeline with preset {preset.name!r} are in 8 bits, which cannot be read back; load it "
            "with preset='exact' to save it, and give the preset when loading"
        )


for each in (
    Preset("exact"),
    Preset("fast", linears="int8", reuse=-1, least_window=4096, attention="fp8"),
    Preset("small", linears="int8", all_linears=True, kv="int8", text_on_host=True),
):
    add_preset(each)
