"""Published picture codecs as ours, by their names: LlamaGen's `vq_ds16_c2i.pt` and VAR's `vae_ch160v4096z32.pth`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..vqgan import VQGAN
from .files import read_weights
from .load import LISTED, fill, flat
from .names import Table, renamed, unwrapped
from .tokens import VAR_SCALES

SILENT = ("quantize.codebook_used", "quantize.ema_vocab_hit_SV")  # buffers that training counts in
OUTSIDE: Table = (
    ("quantize.embedding.weight", "codes"),
    ("quantize.quant_resi.qresi_ls.", "mends."),
    ("post_quant_conv.", "from_codes."),
    ("quant_conv.", "to_codes."),
)
PARTS = (
    r"(?:(?:res|block)\.(?P<resnet>\d+)|attn\.(?P<attention>\d+)|(?P<down>downsample)|(?P<up>upsample))\.(?P<rest>.+)"
)
STAGE = re.compile(r"(?P<half>encoder|decoder)\.(?:conv_blocks|down|up)\.(?P<stage>\d+)\." + PARTS)
MIDDLE = re.compile(r"(?P<half>encoder|decoder)\.mid\.(?P<part>0|1|2|block_1|attn_1|block_2)\.(?P<rest>.+)")
KINDS = {"resnet": "resnets.", "attention": "attentions.", "down": "downsamplers.", "up": "upsamplers."}
MIDDLES = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
MIDDLES |= {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
INSIDE: Table = (
    ("nin_shortcut.", "conv_shortcut."),
    ("norm.", "group_norm."),
    ("q.", "to_q."),
    ("k.", "to_k."),
    ("v.", "to_v."),
    ("proj_out.", "to_out.0."),
)


def load_token_codec(
    source: str | Path, *, config: Mapping[str, Any] | None = None, torch_dtype: torch.dtype | None = None
) -> VQGAN:
    """A picture codec from published weights.

    Args:
        source: a file, or a folder with one.
        config: settings of `VQGAN` that the shapes don't tell, such as scale_sides (256 x 256 pixels unless said).
        torch_dtype: of the weights; as stored by default.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: damaged, unsafe or foreign files; weights that do not fit, with what is missing and unexpected.
    """
    stored = {unwrapped(name): value for name, value in flat(read_weights(source), source).items()}
    llamagen = "encoder.conv_blocks.0.res.0.conv1.weight" in stored
    if not llamagen and "encoder.down.0.block.0.conv1.weight" not in stored:
        raise ValueError(f"{source} holds no codec of LlamaGen or VAR, but {', '.join(list(stored)[:LISTED])}")
    stages = 1 + max(int(found["stage"]) for name in stored if (found := STAGE.match(name)))
    weights: dict[str, Tensor] = {}
    for name, value in stored.items():
        if name not in SILENT:
            weights |= _ours(name, value, None if llamagen else stages)
    try:
        settings = _settings(weights, stages, llamagen) | dict(config or {})
    except KeyError as error:
        raise ValueError(f"the weights in {source} are not a whole codec: {error} is missing") from None
    with torch.device("meta"):
        model = VQGAN(**settings)
    return fill(model, weights, source, torch_dtype).eval()


def _ours(name: str, value: Tensor, reversed_stages: int | None) -> dict[str, Tensor]:
    """One tensor in our words; VAR keeps q, k and v in one, and counts the decoder's stages from the fine end."""
    stage, middle = STAGE.fullmatch(name), MIDDLE.fullmatch(name)
    if stage is not None:
        number, half, rest = int(stage["stage"]), stage["half"], stage["rest"]
        if half == "decoder" and reversed_stages is not None:
            number = reversed_stages - 1 - number
        kind = next(group for group in KINDS if stage[group] is not None)
        part = KINDS[kind] + ("0" if kind in ("down", "up") else stage[kind])
        place, attends = f"{half}.{'down' if half == 'encoder' else 'up'}_blocks.{number}.{part}.", kind == "attention"
    elif middle is not None:
        part, rest = MIDDLES[middle["part"]], middle["rest"]
        place, attends = f"{middle['half']}.mid_block.{part}.", part.startswith("attentions")
    else:
        return {re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", renamed(name, OUTSIDE)): value}
    if not attends:
        return {place + renamed(rest, INSIDE[:1]): value}
    value = value[:, :, 0, 0] if value.ndim == 4 else value  # a convolution of one pixel is a product
    if rest.startswith("qkv."):
        return {f"{place}to_{part}.{rest[4:]}": own for part, own in zip("qkv", value.chunk(3))}
    return {place + renamed(rest, INSIDE): value}


def _settings(weights: Mapping[str, Tensor], stages: int, llamagen: bool) -> dict[str, Any]:
    codes, projection = weights["codes"].shape, weights["to_codes.weight"].shape
    first = "encoder.down_blocks.{}.resnets.{}.conv1.weight"
    blocks = next(number for number in range(len(weights)) if first.format(0, number) not in weights)
    return {
        "widths": [weights[first.format(stage, 0)].shape[0] for stage in range(stages)],
        "blocks": blocks,
        "latent_channels": projection[1],
        "codebook_size": codes[0],
        "code_channels": codes[1],
        "unit_codes": llamagen,
        "kernel": projection[2],
        "scale_sides": None if llamagen else VAR_SCALES[680],
        "shared_mends": len({name.split(".")[1] for name in weights if name.startswith("mends.")}),
    }
