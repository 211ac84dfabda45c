"""The published names of Wan's tensors, in diffusers' words.

Names that no table knows stay as they are, so that whoever loads them reports them as unexpected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Table = Sequence[tuple[str, str]]

# What training frameworks wrap around a model's own names, in any order and number.
WRAPPERS = (
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "module.",
    "model.",
    "generator.",
)

TRANSFORMER: Table = (
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("img_emb.proj.0.", "condition_embedder.image_embedder.norm1."),
    ("img_emb.proj.1.", "condition_embedder.image_embedder.ff.net.0.proj."),
    ("img_emb.proj.3.", "condition_embedder.image_embedder.ff.net.2."),
    ("img_emb.proj.4.", "condition_embedder.image_embedder.norm2."),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("head.modulation", "scale_shift_table"),
    ("head.head.", "proj_out."),
)
BLOCK: Table = (
    ("modulation", "scale_shift_table"),
    ("norm3.", "norm2."),  # the only norm of a block with parameters; diffusers counts it differently
    ("ffn.0.", "ffn.net.0.proj."),
    ("ffn.2.", "ffn.net.2."),
    ("self_attn.", "attn1."),
    ("cross_attn.", "attn2."),
)
ATTENTION: Table = (
    ("q.", "to_q."),
    ("k.", "to_k."),
    ("v.", "to_v."),
    ("o.", "to_out.0."),
    ("k_img.", "add_k_proj."),
    ("v_img.", "add_v_proj."),
    ("norm_k_img.", "norm_added_k."),
)
RESIDUAL: Table = (
    ("residual.0.", "norm1."),
    ("residual.2.", "conv1."),
    ("residual.3.", "norm2."),
    ("residual.6.", "conv2."),
    ("shortcut.", "conv_shortcut."),
)
AUTOENCODER: Table = (("conv1.", "quant_conv."), ("conv2.", "post_quant_conv."))
CODER: Table = (
    ("conv1.", "conv_in."),
    ("head.0.", "norm_out."),
    ("head.2.", "conv_out."),
    ("middle.0.", "mid_block.resnets.0."),
    ("middle.1.", "mid_block.attentions.0."),
    ("middle.2.", "mid_block.resnets.1."),
)
TEXT_ENCODER: Table = (("token_embedding.", "shared."), ("norm.", "encoder.final_layer_norm."))
TEXT_BLOCK: Table = (
    ("norm1.", "layer.0.layer_norm."),
    ("attn.", "layer.0.SelfAttention."),
    ("pos_embedding.embedding.", "layer.0.SelfAttention.relative_attention_bias."),
    ("norm2.", "layer.1.layer_norm."),
    ("ffn.gate.0.", "layer.1.DenseReluDense.wi_0."),
    ("ffn.fc1.", "layer.1.DenseReluDense.wi_1."),
    ("ffn.fc2.", "layer.1.DenseReluDense.wo."),
)


def unwrapped(name: str) -> str:
    """`name` without what training frameworks put in front of it, or between its parts."""
    for inner in WRAPPERS[:3]:
        name = name.replace(inner, "")
    while True:
        for wrapper in WRAPPERS:
            if name.startswith(wrapper):
                name = name.removeprefix(wrapper)
                break
        else:
            return name


def renamed(name: str, table: Table) -> str:
    """`name` with its beginning replaced as the table says."""
    for old, new in table:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def transformer_name(name: str) -> str:
    """An original name (`blocks.0.self_attn.q.weight`) in diffusers' words."""
    block = re.match(r"blocks\.\d+\.", name)
    if block is None:
        return renamed(name, TRANSFORMER)
    inside = renamed(name[block.end() :], BLOCK)
    attention = re.match(r"attn[12]\.", inside)
    if attention is not None:
        inside = attention.group() + renamed(inside[attention.end() :], ATTENTION)
    return block.group() + inside


def vae_name(name: str, resnets: int = 3) -> str:
    """An original name of Wan 2.1's autoencoder in diffusers' words; `resnets` stand in each block of the decoder."""
    coder = re.match(r"(encoder|decoder)\.", name)
    if coder is None:
        return renamed(name, AUTOENCODER)
    inside = renamed(name[coder.end() :], CODER)
    layer = re.match(r"(downsamples|upsamples)\.(\d+)\.", inside)
    if layer is not None:
        block, item = divmod(int(layer[2]), resnets + 1)
        place = f"resnets.{item}." if item < resnets else "upsamplers.0."
        begin = f"down_blocks.{layer[2]}." if layer[1] == "downsamples" else f"up_blocks.{block}.{place}"
        inside = begin + inside[layer.end() :]
    residual = re.match(r"((?:mid_block|up_blocks\.\d+)\.resnets\.\d+\.|down_blocks\.\d+\.)(.*)", inside)
    if residual is not None:
        inside = residual[1] + renamed(residual[2], RESIDUAL)
    return coder.group() + inside


def text_encoder_name(name: str) -> str:
    """An original name of umT5's encoder in the words of transformers' `UMT5EncoderModel`."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block is None:
        return renamed(name, TEXT_ENCODER)
    return f"encoder.block.{block[1]}." + renamed(name[block.end() :], TEXT_BLOCK)
