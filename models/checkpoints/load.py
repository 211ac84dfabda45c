"""From files to models: configs read or worked out from shapes, names compared, everything that does not fit named."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from ..transformer import CausalTransformer3DModel
from .dialects import open_adapter, open_checkpoint
from .files import named_tensors, read_json, read_weights
from .lora import merge_lora
from .names import text_encoder_name, unwrapped, vae_name

HEAD_DIM = 128  # of every published Wan transformer; it can't be told from shapes
IGNORED = {"norm_added_q"}  # diffusers' image-to-video folders carry it, and nothing uses it
LISTED = 6  # names shown of a list of misfits

Model = TypeVar("Model", bound=nn.Module)


def load_transformer(
    source: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    family: Mapping[str, Any] | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    ema: bool = True,
    torch_dtype: torch.dtype | None = None,
    headers_only: bool = False,
) -> CausalTransformer3DModel:
    """A transformer from weights in any dialect.

    Args:
        source: a file or a folder; see `dialects`.
        config: of the model, as diffusers writes it; by default what the shapes say, and what they cannot tell from
            the `config.json` beside the weights (or else heads of 128 channels, as all published ones have).
        family: the config of a related model, for what the shapes cannot tell where there is none beside the weights.
            Like the one beside them it is believed only if it is as wide as these weights.
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
    settings = dict(config or _completed(config_from_shapes(weights, source), [_config_beside(Path(source)), family]))
    model = _built(lambda: CausalTransformer3DModel.from_config(settings), source)
    fill(model, weights, source, torch_dtype)
    if lora is not None:
        merge_lora(model, open_adapter(lora, headers_only=headers_only).weights, scale=lora_scale)
    return model.eval()


def load_vae(
    source: str | Path, *, torch_dtype: torch.dtype | None = None, headers_only: bool = False
) -> AutoencoderKLWan:
    """Wan's autoencoder from diffusers' folder, or Wan 2.1's from its original file.

    Raises:
        FileNotFoundError, ValueError: as `load_transformer`; ValueError too where the statistics of the latents are not
            given, since pictures would come out as snow.
    """
    stored = flat(read_weights(source, headers_only=headers_only), source)
    stored = {unwrapped(name): value for name, value in stored.items()}
    config = _json_beside(Path(source), "z_dim", "latents_mean")
    if "decoder.conv_in.weight" in stored:
        if config is None or not {"latents_mean", "latents_std"} <= config.keys():
            raise ValueError(
                f"{source} has no config.json with latents_mean and latents_std, without which it makes snow; "
                "fetch the whole vae folder"
            )
        weights = stored
    elif "decoder.conv1.weight" in stored:
        need_ranks(stored, {"decoder.conv1.weight": 5, "encoder.conv1.weight": 5}, source)
        channels = stored["decoder.conv1.weight"].shape[1]
        if channels != 16 and (config is None or "latents_mean" not in config):
            raise ValueError(
                f"{source} is an original autoencoder of {channels} latent channels, and only Wan 2.1's 16 have "
                "statistics that are known without a config; take diffusers' folder of this model"
            )
        config = config or {"base_dim": stored["encoder.conv1.weight"].shape[0]}
        resnets = config.get("num_res_blocks", 2)
        if not isinstance(resnets, int) or resnets < 0:
            raise ValueError(f"num_res_blocks in the config beside {source} must be a whole number, got {resnets!r}")
        weights = {vae_name(name, 1 + resnets): value for name, value in stored.items()}
    else:
        raise ValueError(f"{source} holds no Wan autoencoder, but {', '.join(list(stored)[:LISTED])}")
    vae = _built(lambda: AutoencoderKLWan.from_config(config), source)
    fill(vae, weights, source, torch_dtype)
    return vae.eval()


def load_text_encoder(
    source: str | Path, *, torch_dtype: torch.dtype | None = None, headers_only: bool = False
) -> UMT5EncoderModel:
    """umT5's encoder from a transformers folder, or from the original file that comes with Wan.

    Raises:
        FileNotFoundError, ValueError: as `load_transformer`.
    """
    stored = flat(read_weights(source, headers_only=headers_only), source)
    settings = _json_beside(Path(source), "d_model")
    if "token_embedding.weight" in stored:
        weights = {text_encoder_name(name): value for name, value in stored.items()}
        settings = settings or _text_config(weights, source)
    else:
        weights = dict(stored)
    if "shared.weight" not in weights and "encoder.embed_tokens.weight" in weights:
        weights["shared.weight"] = weights["encoder.embed_tokens.weight"]
    if settings is None or "shared.weight" not in weights:
        raise ValueError(f"{source} holds no umT5 encoder with its config.json, but {', '.join(list(stored)[:LISTED])}")
    encoder = _built(lambda: UMT5EncoderModel(UMT5Config.from_dict(settings)), source)
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    fill(encoder, weights, source, torch_dtype)
    encoder.tie_weights()
    return encoder.eval()


def _built(make: Callable[[], Any], source: str | Path) -> Any:
    """The model that a config makes, on the meta device; ValueError if it makes none."""
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:  # a config may hold anything
        raise ValueError(f"the config of {source} makes no model: {error}") from error


def fill(model: Model, weights: Mapping[str, Tensor], source: str | Path, dtype: torch.dtype | None) -> Model:
    """Give a model on the meta device its weights.

    Raises:
        ValueError: names or shapes differ, with the lists; or weights are no plain floating point numbers.
    """
    state = model.state_dict()
    check_names({name: tuple(value.shape) for name, value in state.items()}, weights, source)
    for name, value in weights.items():
        if value.layout != torch.strided or (state[name].is_floating_point() and not value.is_floating_point()):
            raise ValueError(f"the weights in {source} do not fit this model: {name} is {value.layout} {value.dtype}")
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


def need_ranks(weights: Mapping[str, Tensor], ranks: Mapping[str, int], source: str | Path) -> None:
    """ValueError if a tensor is missing, or has another number of dimensions than in `ranks`."""
    for name, rank in ranks.items():
        if name not in weights:
            raise ValueError(f"the weights in {source} are not a whole model: {name} is missing")
        if weights[name].ndim != rank:
            shape = tuple(weights[name].shape)
            raise ValueError(
                f"the weights in {source} do not fit this model: {name} {shape} is not of {rank} dimensions"
            )


def _completed(told: dict[str, Any], configs: list[Mapping[str, Any] | None]) -> dict[str, Any]:
    """What shapes tell, with what they do not tell from the first of `configs` that is as wide."""
    dim = told["num_attention_heads"] * told["attention_head_dim"]
    for config in configs:
        number, size = ((config or {}).get(name) for name in ("num_attention_heads", "attention_head_dim"))
        if config is None or not isinstance(number, int) or not isinstance(size, int) or number < 1:
            continue
        if number * size != dim:
            continue
        known: dict[str, Any] = {"num_attention_heads": number, "attention_head_dim": size}
        played, theirs = told["action_modules"], config.get("action_modules")
        if played and isinstance(theirs, Mapping):  # how a head's channels divide among time, rows and columns
            rope = theirs.get("rope_dim_list")
            if isinstance(rope, list) and sum(rope) == sum(played.get("rope_dim_list", [])):
                known["action_modules"] = {**theirs, **played, "rope_dim_list": rope}
        return {**config, **told, **known}
    return told


def config_from_shapes(weights: Mapping[str, Tensor], source: str | Path = "this file") -> dict[str, Any]:
    """The config that weights in diffusers' names imply. ValueError if the names that tell it are not there."""
    needed = ("patch_embedding.weight", "proj_out.weight", "blocks.0.ffn.net.0.proj.weight")
    embedder = "condition_embedder"
    needed += (f"{embedder}.time_embedder.linear_1.weight", f"{embedder}.text_embedder.linear_1.weight")
    played = action_modules(weights)
    reads = not played or needed[-1] in weights
    if not reads:
        needed = needed[:-1]  # it reads a picture, and no words
    absent = [name for name in needed if name not in weights]
    if absent:
        raise ValueError(
            f"the weights in {source} are not those of a whole transformer: {', '.join(absent)} are missing"
        )
    need_ranks(weights, {name: 5 if name == needed[0] else 2 for name in needed}, source)
    patch, shape = weights[needed[0]], {name: tuple(weights[name].shape) for name in needed}
    dim, channels, *size = patch.shape
    image = weights.get(f"{embedder}.image_embedder.norm1.weight")
    positions = weights.get(f"{embedder}.image_embedder.pos_embed")
    for name, one, rank in (("norm1.weight", image, 1), ("pos_embed", positions, 3)):
        if one is not None:
            need_ranks({name: one}, {name: rank}, source)
    if not dim or not math.prod(size):
        raise ValueError(f"the weights in {source} do not fit this model: {needed[0]} is empty")
    head_dim = HEAD_DIM if dim % HEAD_DIM == 0 else dim
    return {
        "patch_size": size,
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": shape[needed[1]][0] // math.prod(size),
        "text_dim": shape[needed[-1]][1] if reads else None,
        "freq_dim": shape[needed[3]][1],
        "ffn_dim": shape[needed[2]][0],
        "num_layers": _layers(weights, "blocks", source),
        "cross_attn_norm": any(re.fullmatch(r"blocks\.\d+\.norm2\.weight", name) for name in weights),
        "image_dim": None if image is None else image.shape[0],
        "added_kv_proj_dim": dim if any(name.endswith(".attn2.add_k_proj.weight") for name in weights) else None,
        "pos_embed_seq_len": None if positions is None else positions.shape[1],
        "action_modules": played,
    }


def action_modules(weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The `action_modules` that weights imply; None where there are none. ValueError if they are not whole."""
    found = (re.match(r"blocks\.(\d+)\.action_model\.", name) for name in weights)
    blocks = sorted({int(each[1]) for each in found if each})
    if not blocks:
        return None
    try:
        return _action_modules(weights, blocks)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        raise ValueError(f"the weights of blocks.{blocks[0]}.action_model are not whole, or of another model") from None


def _action_modules(weights: Mapping[str, Tensor], blocks: list[int]) -> dict[str, Any]:
    inside = f"blocks.{blocks[0]}.action_model."
    shapes = {name.removeprefix(inside): tuple(value.shape) for name, value in weights.items() if inside in name}
    wide = head = 0
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


def _layers(weights: Mapping[str, Tensor], before: str, source: str | Path) -> int:
    """How many layers there are, by the numbers behind `before` in the names."""
    found = (re.match(rf"{re.escape(before)}\.(\d+)\.", name) for name in weights)
    number = 1 + max((int(each[1]) for each in found if each), default=-1)
    if number > len(weights):
        raise ValueError(f"the weights in {source} name layer {number - 1} of {before}, and are only {len(weights)}")
    return number


def _text_config(weights: Mapping[str, Tensor], source: str | Path) -> dict[str, Any]:
    attention = "encoder.block.0.layer.0.SelfAttention"
    needed = ("shared.weight", f"{attention}.relative_attention_bias.weight", f"{attention}.q.weight")
    needed += ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight",)
    need_ranks(weights, dict.fromkeys(needed, 2), source)
    heads = weights[needed[1]]
    if not heads.numel():
        raise ValueError(f"the weights in {source} do not fit this model: {needed[1]} is empty")
    vocabulary, dim = weights["shared.weight"].shape
    return {
        "vocab_size": vocabulary,
        "d_model": dim,
        "d_kv": weights[needed[2]].shape[0] // heads.shape[1],
        "d_ff": weights[needed[3]].shape[0],
        "num_heads": heads.shape[1],
        "relative_attention_num_buckets": heads.shape[0],
        "num_layers": _layers(weights, "encoder.block", source),
        "feed_forward_proj": "gated-gelu",
    }


def flat(stored: Mapping[str, Any], source: str | Path) -> dict[str, Tensor]:
    """Tensors by name, out of the dictionary that a training run wrapped around them. Errors: `named_tensors`."""
    for nest in ("state_dict", "model"):
        if isinstance(stored.get(nest), Mapping):
            stored = stored[nest]
    return named_tensors(stored, source)


def _json_beside(source: Path, *kinds: str) -> dict[str, Any] | None:
    """The config.json beside weights, if it has one of these keys; another model's may lie in the same folder."""
    source = source.expanduser()
    path = (source if source.is_dir() else source.parent) / "config.json"
    found = read_json(path)
    return found if found is not None and found.keys() & set(kinds) else None


def _config_beside(source: Path) -> dict[str, Any] | None:
    """What shapes cannot tell, of the transformer's config beside its weights; None where there is none."""
    found = _json_beside(source, "num_attention_heads", "num_heads")
    if found is None or "num_attention_heads" in found:
        return found
    dim, heads = found.get("dim"), found["num_heads"]
    if not isinstance(dim, int) or not isinstance(heads, int) or heads < 1:
        return None
    return {"num_attention_heads": heads, "attention_head_dim": dim // heads, "eps": found.get("eps", 1e-6)}
