"""From a folder or a repository to the parts of a video pipeline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel

from ..models.checkpoints import load_text_encoder, load_transformer, load_vae
from ..models.checkpoints.files import INDEX, first_line, named_tensors, read_index, read_json, read_weights
from ..models.checkpoints.load import fill, need_ranks
from ..models.tiny_vae import TinyVideoDecoder
from ..models.transformer import CausalTransformer3DModel
from .recipes import RECIPES, Recipe, find_recipe

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "decoder", "image_encoder")
SETTINGS = ("size", "rate", "text_length")
RELEASED = {  # a name that the file of each part holds where Wan is released in its own layout
    "transformer": "blocks.0.self_attn.q.weight",
    "vae": "decoder.conv1.weight",
    "text_encoder": "token_embedding.weight",
}


def local_folder(name: str | Path, *, transformer: bool = True) -> Path:
    """The folder `name`, or what is fetched of the repository of that name on the Hugging Face hub.

    Raises:
        FileNotFoundError: there is no such folder, and `name` is no `owner/name`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no folder {folder}; give one in diffusers' layout, or owner/name on the hub")
    from huggingface_hub import snapshot_download

    wanted = [part for part in PARTS if transformer or part != "transformer"]
    patterns = ["*.json", "*.pth", "google/*", *(f"{part}/*" for part in wanted), *(["*.safetensors"] * transformer)]
    return Path(snapshot_download(str(name), allow_patterns=patterns))


def load_components(
    source: str | Path,
    *,
    checkpoint: str | Path | None,
    lora: str | Path | None,
    recipe: Recipe | str | None,
    decoder: str | Path | None,
    torch_dtype: torch.dtype | None,
    quantization_config: Any = None,
    headers_only: bool = False,
) -> dict[str, Any]:
    """The arguments of `VideoPipeline`; see its `from_pretrained`."""
    narrow: dict[str, Any] = {}
    if quantization_config is not None:
        from ..models.library_quantizers import configs_of, quantize_as  # which import the libraries that quantise

        narrow = configs_of(quantization_config)
        if headers_only:
            raise ValueError("what weights take under quantization_config is not known before it is done; leave it out")
    folder = local_folder(source, transformer=checkpoint is None)
    saved = saved_settings(folder, recipe is None)
    if recipe is None and "recipe" not in saved:
        raise ValueError(f"{folder} does not say how its weights are run; give recipe=, one of {', '.join(RECIPES)}")
    chosen = find_recipe(saved["recipe"] if recipe is None else recipe)
    found = find_parts(folder)
    config = read_json(folder / "transformer" / "config.json")
    how: dict[str, Any] = {"torch_dtype": torch_dtype, "headers_only": headers_only}
    if checkpoint is None:
        transformer = load_transformer(need(found, "transformer", folder), config=config, lora=lora, **how)
    else:  # the folder may hold a model of another size
        transformer = load_transformer(checkpoint, family=config, lora=lora, **how)
    if "transformer" in narrow:
        quantize_as(transformer, narrow["transformer"])  # pyright: ignore[reportPossiblyUnboundVariable]
    vae = load_vae(need(found, "vae", folder), **how)
    reads = "text_encoder" in found
    if "text_encoder" in narrow and not reads:
        raise ValueError(f"quantization_config names the text encoder, and {folder} has none; leave it out")
    tokenizer = need(found, "tokenizer", folder) if reads else None
    return {
        **{name: saved[name] for name in SETTINGS if name in saved},
        "transformer": transformer,
        "vae": vae,
        "text_encoder": load_reader(found["text_encoder"], narrow.get("text_encoder"), **how) if reads else None,
        "tokenizer": None if tokenizer is None else load_tokenizer(tokenizer, headers_only=headers_only),
        "image_encoder": load_image_encoder(found["image_encoder"], **how) if "image_encoder" in found else None,
        "recipe": chosen,
        "decoder": _load_decoder(folder, decoder, how),
    }


def load_reader(folder: Path, quantization_config: Any, **how: Any) -> UMT5EncoderModel:
    """umT5's encoder; quantised ones are loaded as transformers does it. ValueError if that can't load it."""
    if quantization_config is None:
        return load_text_encoder(folder, **how)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"a text encoder is quantised from a folder as transformers saves it, and {folder} is none; quantise the "
            "transformer alone, or save the encoder with save_pretrained first"
        )
    return UMT5EncoderModel.from_pretrained(
        folder, quantization_config=quantization_config, dtype=how["torch_dtype"], local_files_only=True
    ).eval()


def load_image_encoder(
    folder: Path, *, torch_dtype: torch.dtype | None = None, headers_only: bool = False
) -> CLIPVisionModel:
    """CLIP, as transformers saves it. ValueError if its folder is incomplete or damaged."""
    try:
        if not headers_only:
            return CLIPVisionModel.from_pretrained(folder, torch_dtype=torch_dtype)
        config = CLIPVisionConfig.from_pretrained(folder)
        with torch.device("meta"):
            model: Any = CLIPVisionModel(config)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} holds no image encoder that can be read: {first_line(error)}") from None
    return model.to(torch_dtype or config.dtype or torch.float32)


def _load_decoder(folder: Path, given: str | Path | None, how: dict[str, Any]) -> TinyVideoDecoder | None:
    if given is None:
        if not (folder / "decoder").is_dir():
            return None
        given = folder / "decoder"
    return load_tiny_decoder(given, **how)


def load_tiny_decoder(
    source: str | Path, *, torch_dtype: torch.dtype | None = None, headers_only: bool = False
) -> TinyVideoDecoder:
    """A tiny decoder from TAEHV's weights, or from a folder. Errors as of `load_transformer`."""
    stored = read_weights(source, headers_only=headers_only)
    stored = {name: value for name, value in named_tensors(stored, source).items() if name.startswith("decoder.")}
    if "decoder.1.weight" not in stored or "decoder.22.weight" not in stored:
        raise ValueError(f"{source} holds no TAEHV decoder: decoder.1.weight and decoder.22.weight are not in it")
    layers = [f"decoder.{layer}.weight" for layer in (1, 8, 14, 20)]
    need_ranks(stored, dict.fromkeys([*layers, "decoder.22.weight"], 4), source)
    widths = [stored[name].shape[0] for name in layers]
    patch = round((stored["decoder.22.weight"].shape[0] / 3) ** 0.5)
    with torch.device("meta"):
        decoder: Any = TinyVideoDecoder(stored["decoder.1.weight"].shape[1], patch, widths)
    fill(decoder, stored, source, torch_dtype)
    return decoder.to(memory_format=torch.channels_last).eval()


def find_parts(folder: Path) -> dict[str, Path]:
    """Where each part lies: in diffusers' folders, or in the files of a Wan folder as released, told by their names."""
    found = {part: folder / part for part in PARTS if (folder / part).is_dir()}
    if "vae" in found or "transformer" in found:
        return found
    listed = {index: read_index(index) for index in sorted(folder.glob(INDEX))}
    shards = {name for places in listed.values() for name in places.values()}
    files = sorted(path for path in folder.iterdir() if path.suffix in (".pth", ".pt", ".safetensors"))
    for file in [*listed, *(path for path in files if path.name not in shards)]:
        names = listed[file] if file in listed else read_weights(file, headers_only=True)
        for part, name in RELEASED.items():
            if part not in found and name in names:
                found[part] = file
    tokenizers = sorted(folder.rglob("tokenizer_config.json"))
    return found | ({"tokenizer": tokenizers[0].parent} if tokenizers else {})


def need(found: dict[str, Path], part: str, folder: Path) -> Path:
    if part not in found:
        raise FileNotFoundError(
            f"{folder} has no {part}; a model has {', '.join(PARTS[:4])} (the first may be given as checkpoint=)"
        )
    return found[part]


def saved_settings(folder: Path, recipe: bool = True) -> dict[str, Any]:
    """What `VideoPipeline.save_pretrained` wrote beside the parts. ValueError if it makes no sense; of its recipe only
    where that is asked for."""
    index = folder / "model_index.json"
    saved = read_json(index) or {}
    try:
        check_settings(**{name: saved[name] for name in SETTINGS if name in saved})
        if recipe and "recipe" in saved:
            find_recipe(saved["recipe"])
    except ValueError as error:
        raise ValueError(f"{index}: {error}") from None
    return saved


def check_settings(size: Any = (16, 16), rate: Any = 1.0, text_length: Any = 1) -> None:
    """ValueError for settings of a pipeline that are none."""
    pair = isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2
    if not pair or not all(_is_whole(side) for side in size):
        raise ValueError(f"size must be (height, width) in pixels, got {size!r}")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
        raise ValueError(f"rate must be pictures per second, above 0, got {rate!r}")
    if not _is_whole(text_length):
        raise ValueError(f"text_length must be a whole number of tokens from 1 on, got {text_length!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def load_tokenizer(folder: Path, *, headers_only: bool = False) -> PreTrainedTokenizerBase | None:
    """A tokenizer, as transformers saves it; with `headers_only` its files are looked at, and none is made.

    Raises:
        ValueError: a file is damaged, or they make no tokenizer.
    """
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        read_json(folder / name)
    if headers_only:
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # its files may hold anything
        raise ValueError(
            f"the files in {folder} make no tokenizer ({type(error).__name__}: {first_line(error)}); fetch them again"
        ) from None


def check_parts(
    transformer: CausalTransformer3DModel,
    vae: AutoencoderKLWan,
    text_encoder: UMT5EncoderModel | None,
    decoder: TinyVideoDecoder | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """ValueError if the parts do not fit together."""
    config, channels = transformer.config, vae.config["z_dim"]
    beside = 4 + channels if config["action_modules"] else 0  # where a picture stands beside the noise
    if (config["in_channels"] - beside, config["out_channels"] or config["in_channels"]) != (channels, channels):
        raise ValueError(
            f"the transformer takes {config['in_channels']} channels and makes {config['out_channels']}, the "
            f"autoencoder has {channels}: they do not belong together (models that take an image beside the noise are "
            "not causal and are not run here)"
        )
    if text_encoder is not None and text_encoder.config.d_model != config["text_dim"]:
        raise ValueError(
            f"the transformer reads prompts {config['text_dim']} wide, the text encoder writes them "
            f"{text_encoder.config.d_model} wide"
        )
    if text_encoder is not None and tokenizer is not None:
        largest, known = max(tokenizer.get_vocab().values(), default=0), text_encoder.config.vocab_size
        if largest >= known:
            raise ValueError(
                f"the tokenizer gives words numbers up to {largest}, the text encoder knows {known}: they do not "
                "belong together; take the tokenizer of this model"
            )
    if decoder is not None:
        seen = (decoder.config["latent_channels"], decoder.pixels)
        wanted = (channels, vae.config["scale_factor_spatial"])
        if seen != wanted:
            raise ValueError(
                f"the tiny decoder reads latents of {seen[0]} channels and {seen[1]} pixels each way, the autoencoder "
                f"makes them of {wanted[0]} channels and {wanted[1]} pixels: give a decoder of this autoencoder's "
                "family, or leave decoder= out"
            )
