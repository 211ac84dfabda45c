"""From files to models: configs read or worked out from shapes, names compared, everything that does not fit named."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from ..transformer import CausalTransformer3DModel
from .dialects import open_checkpoint
from .files import read_weights
from .lora import merge_lora
from .names import text_encoder_name, unwrapped, vae_name

HEAD_DIM = 128  # of every published Wan transformer; it can't be told from shapes
IGNORED = {"norm_added_q"}  # diffusers' image-to-video folders carry it, and nothing uses it
ORIGINAL_CONFIG = {"dim", "num_heads", "ffn_dim", "in_dim"}  # of a Wan folder as released
LISTED = 6  # names shown of a list of misfits

Model = TypeVar("Model", bound=nn.Module)


def load_transformer(
    source: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    ema: bool = True,
    torch_dtype: torch.dtype | None = None,
    headers_only: bool = False,
) -> CausalTransformer3DModel:
    """A transformer from weights in any dialect.

    Args:
        source: a file or a folder; see `dialects`.
        config: of the model, as diffusers writes it; by default the `config.json` beside the weights, or else what the
            shapes say (with heads of 128 channels, as all published ones).
        lora: an adapter to merge.
        lora_scale: its strength.
        ema: take averaged weights where there are both.
        torch_dtype: of the weights; as stored by default. Norms, modulation and the time embedding stay in float32.
        headers_only: the same checks, and a model on the meta device; no weights are read.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: damaged, unsafe or foreign files; weights that do not fit, with what is missing and unexpected.
    """
    checkpoint = open_checkpoint(source, ema=ema, headers_only=headers_only)
    if checkpoint.dialect == "lora":
        raise ValueError(f"{source} is an adapter, not a model; give it as lora=, and the model it was made for here")
    weights = {name: value for name, value in checkpoint.weights.items() if not set(name.split(".")) & IGNORED}
    settings = config or config_from_shapes(weights) | (_config_beside(Path(source)) or {})
    with torch.device("meta"):
        model: Any = CausalTransformer3DModel.from_config(dict(settings))
    fill(model, weights, source, torch_dtype)
    if lora is not None:
        adapter = open_checkpoint(lora, headers_only=headers_only)
        if adapter.dialect != "lora":
            raise ValueError(f"{lora} is a whole model ({adapter.dialect}), no adapter; give it as the model itself")
        merge_lora(model, adapter.weights, scale=lora_scale)
    return model.eval()


def load_vae(
    source: str | Path, *, torch_dtype: torch.dtype | None = None, headers_only: bool = False
) -> AutoencoderKLWan:
    """Wan's autoencoder from diffusers' folder, or Wan 2.1's from its original file.

    Raises:
        FileNotFoundError, ValueError: as `load_transformer`; ValueError too where the statistics of the latents are not
            given, since pictures would come out as snow.
    """
    stored = {unwrapped(name): value for name, value in flat(read_weights(source, headers_only=headers_only)).items()}
    config = _json_beside(Path(source))
    if "decoder.conv_in.weight" in stored:
        if config is None or not {"latents_mean", "latents_std"} <= config.keys():
            raise ValueError(
                f"{source} has no config.json with latents_mean and latents_std, without which it makes snow; "
                "fetch the whole vae folder"
            )
        weights = stored
    elif "decoder.conv1.weight" in stored:
        channels = stored["decoder.conv1.weight"].shape[1]
        if channels != 16 and (config is None or "latents_mean" not in config):
            raise ValueError(
                f"{source} is an original autoencoder of {channels} latent channels, and only Wan 2.1's 16 have "
                "statistics that are known without a config; take diffusers' folder of this model"
            )
        config = config or {"base_dim": stored["encoder.conv1.weight"].shape[0]}
        resnets = 1 + config.get("num_res_blocks", 2)
        weights = {vae_name(name, resnets): value for name, value in stored.items()}
    else:
        raise ValueError(f"{source} holds no Wan autoencoder, but {', '.join(list(stored)[:LISTED])}")
    with torch.device("meta"):
        vae: Any = AutoencoderKLWan.from_config(config)
    fill(vae, weights, source, torch_dtype)
    return vae.eval()


def load_text_encoder(
    source: str | Path, *, torch_dtype: torch.dtype | None = None, headers_only: bool = False
) -> UMT5EncoderModel:
    """umT5's encoder from a transformers folder, or from the original file that comes with Wan.

    Raises:
        FileNotFoundError, ValueError: as `load_transformer`.
    """
    stored = flat(read_weights(source, headers_only=headers_only))
    settings = _json_beside(Path(source))
    if "token_embedding.weight" in stored:
        weights = {text_encoder_name(name): value for name, value in stored.items()}
        settings = settings or _text_config(weights)
    else:
        weights = dict(stored)
    if "shared.weight" not in weights and "encoder.embed_tokens.weight" in weights:
        weights["shared.weight"] = weights["encoder.embed_tokens.weight"]
    if settings is None or "shared.weight" not in weights:
        raise ValueError(f"{source} holds no umT5 encoder with its config.json, but {', '.join(list(stored)[:LISTED])}")
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config.from_dict(settings))
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    fill(encoder, weights, source, torch_dtype)
    encoder.tie_weights()
    return encoder.eval()


def fill(model: Model, weights: Mapping[str, Tensor], source: str | Path, dtype: torch.dtype | None) -> Model:
    """Give a model on the meta device its weights.

    Raises:
        ValueError: names or shapes differ, with the lists.
    """
    check_names({name: tuple(value.shape) for name, value in model.state_dict().items()}, weights, source)
    precise = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    cast = {}
    for name, value in weights.items():
        wanted = dtype
        if value.is_floating_point() and precise & set(name.split(".")):
            wanted = torch.float32
        cast[name] = value.to(wanted) if wanted is not None and value.is_floating_point() else value
    model.load_state_dict(cast, assign=True)
    return model.requires_grad_(False)


def check_names(wanted: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], source: str | Path) -> None:
    """ValueError if `weights` are not exactly the tensors that are wanted."""
    missing = sorted(wanted.keys() - weights.keys())
    unexpected = sorted(weights.keys() - wanted.keys())
    shaped = [
        f"{name} {tuple(weights[name].shape)} instead of {shape}"
        for name, shape in sorted(wanted.items())
        if name in weights and tuple(weights[name].shape) != shape
    ]
    lists = (("missing", missing), ("unexpected", unexpected), ("of another shape", shaped))
    if any(names for _, names in lists):
        told = "; ".join(f"{len(names)} {what}: {_listed(names)}" for what, names in lists if names)
        raise ValueError(f"the weights in {source} do not fit this model: {told}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def config_from_shapes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config that weights in diffusers' names imply. ValueError if the names that tell it are not there."""
    needed = ("patch_embedding.weight", "proj_out.weight", "blocks.0.ffn.net.0.proj.weight")
    embedder = "condition_embedder"
    needed += (f"{embedder}.time_embedder.linear_1.weight", f"{embedder}.text_embedder.linear_1.weight")
    played = action_modules(weights)
    if played:
        needed = needed[:-1]  # it reads a picture, and no words
    absent = [name for name in needed if name not in weights]
    if absent:
        raise ValueError(f"the weights are not those of a whole transformer: {', '.join(absent)} are missing")
    patch, shape = weights[needed[0]], {name: tuple(weights[name].shape) for name in needed}
    dim, channels, *size = patch.shape
    image = weights.get(f"{embedder}.image_embedder.norm1.weight")
    positions = weights.get(f"{embedder}.image_embedder.pos_embed")
    head_dim = HEAD_DIM if dim % HEAD_DIM == 0 else dim
    return {
        "patch_size": size,
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": shape[needed[1]][0] // math.prod(size),
        "text_dim": None if played else shape[needed[4]][1],
        "freq_dim": shape[needed[3]][1],
        "ffn_dim": shape[needed[2]][0],
        "num_layers": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        "cross_attn_norm": "blocks.0.norm2.weight" in weights,
        "image_dim": None if image is None else image.shape[0],
        "added_kv_proj_dim": dim if "blocks.0.attn2.add_k_proj.weight" in weights else None,
        "pos_embed_seq_len": None if positions is None else positions.shape[1],
        "action_modules": played,
    }


def action_modules(weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The `action_modules` that weights imply; None where there are none."""
    blocks = sorted({int(name.split(".")[1]) for name in weights if ".action_model." in name})
    if not blocks:
        return None
    inside = f"blocks.{blocks[0]}.action_model."
    shapes = {name.removeprefix(inside): tuple(value.shape) for name, value in weights.items() if inside in name}
    keys, mouse = "keyboard_attn_kv.weight" in shapes, "t_qkv.weight" in shapes
    found: dict[str, Any] = {"blocks": blocks, "enable_keyboard": keys, "enable_mouse": mouse}
    if keys:
        hidden, buttons = shapes["keyboard_embed.0.weight"]
        wide, head = shapes["mouse_attn_q.weight"][0], shapes["key_attn_q_norm.weight"][0]
        found |= {"keyboard_dim_in": buttons, "hidden_size": hidden, "keyboard_hidden_dim": wide}
        found["windows_size"] = shapes["keyboard_attn_kv.weight"][1] // (4 * hidden)
    if mouse:
        wide, head = shapes["t_qkv.weight"][1], shapes["img_attn_q_norm.weight"][0]
        found["mouse_hidden_dim"] = wide
    if keys or mouse:
        found |= {"heads_num": wide // head, "rope_dim_list": [8, (head - 8) // 2, (head - 8) // 2]}
    return found


def _text_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    heads = weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    vocabulary, dim = weights["shared.weight"].shape
    return {
        "vocab_size": vocabulary,
        "d_model": dim,
        "d_kv": weights["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0] // heads.shape[1],
        "d_ff": weights["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        "num_heads": heads.shape[1],
        "relative_attention_num_buckets": heads.shape[0],
        "num_layers": 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.block.")),
        "feed_forward_proj": "gated-gelu",
    }


def flat(stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, out of the dictionary that a training run wrapped around them."""
    for nest in ("state_dict", "model"):
        if isinstance(stored.get(nest), Mapping):
            stored = stored[nest]
    return {name: value for name, value in stored.items() if isinstance(value, Tensor)}


def _json_beside(source: Path) -> dict[str, Any] | None:
    source = source.expanduser()
    path = (source if source.is_dir() else source.parent) / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _config_beside(source: Path) -> dict[str, Any] | None:
    """The transformer's config beside its weights, in diffusers' words; None where there is none."""
    found = _json_beside(source)
    if found is None or "num_attention_heads" in found:
        return found
    if not found.keys() >= ORIGINAL_CONFIG:
        return None
    image = found.get("model_type") == "i2v"
    played = bool(found.get("action_config"))
    return {
        "num_attention_heads": found["num_heads"],
        "attention_head_dim": found["dim"] // found["num_heads"],
        "in_channels": found["in_dim"],
        "out_channels": found.get("out_dim", 16),
        "ffn_dim": found["ffn_dim"],
        "num_layers": found["num_layers"],
        "freq_dim": found.get("freq_dim", 256),
        "eps": found.get("eps", 1e-6),
        "image_dim": 1280 if image else None,
        "added_kv_proj_dim": found["dim"] if image and not played else None,
    }
