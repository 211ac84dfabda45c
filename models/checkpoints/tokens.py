"""Published token transformers as ours, told apart by their names.

| dialect | what is in the file | our model |
| --- | --- | --- |
| arpg | `layers.self_dec.N.attn.to_q.weight` | kind two_pass, turning "muted" |
| maskgil | `layers.N.attention.wqkv.weight` and `tok_emb.weight` | kind masked, turning "line" |
| var | `blocks.N.attn.mat_qkv.weight` | kind scales, adaptive layers |

Tokens that are never drawn (ARPG's and MaskGIL's mask and dropped ones) lose their rows of the last projection.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..token_transformer import TokenTransformer
from .files import read_weights
from .load import LISTED, fill, flat
from .names import Table, renamed, unwrapped

TokenDialect = Literal["arpg", "maskgil", "var"]
Read = tuple[dict[str, Any], dict[str, Tensor]]  # what the shapes say of the config, and the weights in our words

HEAD_DIM = 64  # of every published one; it can't be told from shapes
VAR_SCALES = {
    680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),  # 256 x 256 pixels
    2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),  # 512 x 512
}
ARPG_BLOCK: Table = (
    ("attn_norm.", "norm1."),
    ("ffn_norm.", "norm2."),
    ("attn.to_q.", "to_q."),
    ("attn.proj.", "to_out."),
    ("ffn.w2.", "feed_forward.down."),
)
MASKGIL_BLOCK: Table = (
    ("attention_norm.", "norm1."),
    ("ffn_norm.", "norm2."),
    ("attention.wqkv.", "to_qkv."),
    ("attention.wo.", "to_out."),
    ("feed_forward.w2.", "feed_forward.down."),
)
VAR_BLOCK: Table = (
    ("attn.mat_qkv.", "to_qkv."),
    ("attn.proj.", "to_out."),
    ("ffn.fc1.", "up."),
    ("ffn.fc2.", "down."),
    ("ada_lin.1.", "modulation.linear."),
    ("ada_gss", "offsets"),
)
VAR_NAMES: Table = (
    ("class_emb.", "class_embedding."),
    ("word_embed.", "token_embedding."),
    ("lvl_embed.weight", "scale_embedding"),
    ("pos_1LC", "position_embedding"),
    ("pos_start", "mask_embedding"),
    ("head_nm.ada_lin.1.", "norm_out.modulation.linear."),
    ("shared_ada_lin.1.", "modulation.linear."),
)
MADE_ANEW = ("lvl_1L", "attn_bias_for_masking")  # buffers that say nothing


def load_token_transformer(
    source: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    torch_dtype: torch.dtype | None = None,
    headers_only: bool = False,
) -> TokenTransformer:
    """A token transformer from published weights.

    Args:
        source: a file, or a folder with one; see the module for what is known.
        config: settings of `TokenTransformer` that the shapes don't tell, such as num_heads (64 channels each unless
            said) and scale_sides.
        torch_dtype: of the weights; as stored by default.
        headers_only: the same checks, and a model on the meta device; no weights are read.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: damaged, unsafe or foreign files; weights that do not fit, with what is missing and unexpected.
    """
    stored = flat(read_weights(source, headers_only=headers_only), source)
    stored = {unwrapped(name): value for name, value in stored.items()}
    dialect = token_dialect(stored, source)
    try:
        settings, weights = DIALECTS[dialect](stored)
    except KeyError as error:
        raise ValueError(f"the weights in {source} are not a whole model of {dialect}: {error} is missing") from None
    settings |= config or {}
    settings.setdefault("num_heads", settings["dim"] // HEAD_DIM)
    if settings.get("kind") == "scales" and "scale_sides" not in settings:
        raise ValueError(
            f"{source} has {len(weights['position_embedding'])} places, of no published pyramid; say how they are "
            'divided: config={"scale_sides": (1, 2, ...)}'
        )
    if "scale_sides" in settings:
        settings["grid"] = (settings["scale_sides"][-1],) * 2
    with torch.device("meta"):
        model = TokenTransformer(**settings)
    fill(model, weights, source, torch_dtype)
    if not headers_only:
        _compute_angles(model, settings)
    return model.eval()


def token_dialect(stored: Mapping[str, Tensor], source: str | Path) -> TokenDialect:
    """Which publication these names are of. ValueError if of none."""
    if "layers.self_dec.0.attn.to_q.weight" in stored:
        return "arpg"
    if "layers.0.attention.wqkv.weight" in stored and "tok_emb.weight" in stored:
        return "maskgil"
    if "blocks.0.attn.mat_qkv.weight" in stored:
        return "var"
    raise ValueError(
        f"{source} holds no token transformer of ARPG, MaskGIL or VAR, but {', '.join(list(stored)[:LISTED])}"
    )


def _compute_angles(model: TokenTransformer, settings: Mapping[str, Any]) -> None:
    """Buffers that are not stored were made on the meta device."""
    small = dict(settings, num_layers=1, num_cross_layers=min(1, settings.get("num_cross_layers", 0)), vocab_size=1)
    twin = TokenTransformer(**{**small, "ffn_dim": 1, "num_classes": 1})
    model.cos, model.sin = twin.cos, twin.sin


def _arpg(stored: Mapping[str, Tensor]) -> Read:
    table, vocabulary = stored["embeddings.weight"], stored["head.weight"].shape[0]
    classes = len(table) - vocabulary - 3  # a mask, the label of no class, a token that is never used
    weights = _embeddings(table, vocabulary, vocabulary + 1, classes)
    weights |= {"head.weight": stored["head.weight"], "norm_out.weight": stored["norm.weight"]}
    weights["norm_shared.weight"] = stored["layers.norm.weight"]
    weights["to_shared.weight"] = torch.cat([stored["layers.to_k.weight"], stored["layers.to_v.weight"]])
    for old, new in (("layers.self_dec.", "self_decoder.blocks."), ("layers.cross_dec.", "cross_decoder.blocks.")):
        for begin, block in _blocks(stored, old).items():
            weights |= _block(block, new + begin, ARPG_BLOCK, ("ffn.w1.weight", "ffn.w3.weight"))
    counts = [len(_blocks(stored, f"layers.{part}_dec.")) for part in ("self", "cross")]
    settings = _settings("two_pass", table, vocabulary, classes, weights, counts[0])
    return settings | {"num_cross_layers": counts[1], "turning": "muted"}, weights


def _maskgil(stored: Mapping[str, Tensor]) -> Read:
    table, vocabulary = stored["tok_emb.weight"], stored["output.weight"].shape[0] - 1
    classes = len(table) - vocabulary - 2
    weights = _embeddings(table, vocabulary, vocabulary + 1, classes)
    weights |= {"head.weight": stored["output.weight"][:vocabulary], "norm_out.weight": stored["norm.weight"]}
    blocks = _blocks(stored, "layers.")
    for begin, block in blocks.items():
        gates = ("feed_forward.w1.weight", "feed_forward.w3.weight")
        weights |= _block(block, "self_decoder.blocks." + begin, MASKGIL_BLOCK, gates)
    settings = _settings("masked", table, vocabulary, classes, weights, len(blocks))
    return settings | {"num_cross_layers": 0, "turning": "line"}, weights


def _var(stored: Mapping[str, Tensor]) -> Read:
    rest = {name: value for name, value in stored.items() if name not in MADE_ANEW and not name.startswith("blocks.")}
    weights = {renamed(name, VAR_NAMES): value for name, value in rest.items()}
    weights["mask_embedding"] = weights["mask_embedding"].flatten()
    weights["position_embedding"] = weights["position_embedding"][0]
    blocks = _blocks(stored, "blocks.")
    for begin, block in blocks.items():
        new = f"self_decoder.blocks.{begin}"
        q, v = block.pop("attn.q_bias"), block.pop("attn.v_bias")
        block.pop("attn.zero_k_bias", None)
        weights[new + "to_qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
        weights[new + "temperature"] = block.pop("attn.scale_mul_1H11").flatten()
        weights |= {new + renamed(name, VAR_BLOCK): value for name, value in block.items()}
        if new + "offsets" in weights:
            weights[new + "offsets"] = weights[new + "offsets"][0, 0]
    classes, dim = weights["class_embedding.weight"].shape
    settings: dict[str, Any] = {
        "kind": "scales",
        "vocab_size": weights["head.weight"].shape[0],
        "dim": dim,
        "ffn_dim": weights["self_decoder.blocks.0.up.weight"].shape[0],
        "num_layers": len(blocks),
        "num_cross_layers": 0,
        "num_classes": classes - 1,
        "token_channels": weights["token_embedding.weight"].shape[1],
        "learned_positions": True,
        "adaptive": True,
        "shared_modulation": "modulation.linear.weight" in weights,
        "num_heads": len(weights["self_decoder.blocks.0.temperature"]),
    }
    scales = VAR_SCALES.get(len(weights["position_embedding"]))
    return settings | ({} if scales is None else {"scale_sides": scales}), weights


DIALECTS: Mapping[TokenDialect, Callable[[Mapping[str, Tensor]], Read]] = {
    "arpg": _arpg,
    "maskgil": _maskgil,
    "var": _var,
}


def _embeddings(table: Tensor, vocabulary: int, first_class: int, classes: int) -> dict[str, Tensor]:
    """One published table as three: tokens, the mask, and labels with the one for none behind them."""
    return {
        "token_embedding.weight": table[:vocabulary].clone(),
        "mask_embedding": table[vocabulary].clone(),
        "class_embedding.weight": table[first_class : first_class + classes + 1].clone(),
    }


def _blocks(stored: Mapping[str, Tensor], beginning: str) -> dict[str, dict[str, Tensor]]:
    """Tensors by layer ("0.", "1.", ...) and by their name inside it."""
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, value in stored.items():
        found = re.match(re.escape(beginning) + r"(\d+\.)", name)
        if found is not None:
            blocks.setdefault(found[1], {})[name[found.end() :]] = value
    return blocks


def _block(block: dict[str, Tensor], new: str, table: Table, gates: tuple[str, str]) -> dict[str, Tensor]:
    """One layer of LLaMA's kind in our words: what we hold as one matrix is put together."""
    weights = {new + "feed_forward.up.weight": torch.cat([block.pop(name) for name in gates])}
    if "attn.to_k.weight" in block:
        parts = [block.pop(f"attn.to_{part}.weight") for part in "qkv"]
        weights[new + "to_qkv.weight"] = torch.cat(parts)
    return weights | {new + renamed(name, table): value for name, value in block.items()}


def _settings(
    kind: str, table: Tensor, vocabulary: int, classes: int, weights: Mapping[str, Tensor], layers: int
) -> dict[str, Any]:
    side = math.isqrt(256)  # of every published one: the shapes say nothing of it
    return {
        "kind": kind,
        "vocab_size": vocabulary,
        "grid": (side, side),
        "dim": table.shape[1],
        "ffn_dim": weights["self_decoder.blocks.0.feed_forward.down.weight"].shape[1],
        "num_layers": layers,
        "num_classes": classes,
        "normed_heads": False,
        "norm_eps": 1e-5,
    }
