"""A folder as Wan releases it, without diffusers' layout: the parts are found by what is in the files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import millstream as ms
from millstream.models.tiny_vae import TinyVideoDecoder
from millstream.pipelines.video_load import load_tiny_decoder

CONFIG = {"_class_name": "WanModel", "model_type": "t2v", "dim": 256, "num_heads": 2, "ffn_dim": 40, "in_dim": 16}
CONFIG |= {"out_dim": 16, "freq_dim": 32, "num_layers": 2, "eps": 1e-6, "text_len": 512}
SETTINGS = {"recipe": "self_forcing", "size": (16, 32), "text_length": 8}


@pytest.fixture
def tokenizer():
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "corgi": 2, "fox": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def save_shards(weights, folder):
    """As the models of 14B are released."""
    names = sorted(weights)
    places = {
        name: f"diffusion_pytorch_model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)
    }
    for file in set(places.values()):
        save_file({name: weights[name].contiguous() for name in names if places[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("config", [False, True])
def test_it_is_loaded_as_it_is(
    config, shards, transformer, vae, text_encoder, tokenizer, original, original_vae, original_text, tmp_path
):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    if shards:
        save_shards(original(transformer.state_dict()), tmp_path)
    else:
        torch.save(original(transformer.state_dict()), tmp_path / "a.pth")
    torch.save(original_vae(vae), tmp_path / "b.pth")
    torch.save(original_text(text_encoder), tmp_path / "c.pth")
    tokenizer.save_pretrained(tmp_path / "google" / "umt5-xxl")
    pipes = (
        ms.VideoPipeline(transformer, vae, text_encoder, tokenizer, **SETTINGS),
        ms.VideoPipeline.from_pretrained(tmp_path, **SETTINGS),
    )
    clips = []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        clips.append(pipe("corgi", num_frames=3, generator=generator, output_type="pt").frames)
    torch.testing.assert_close(*clips, atol=1e-5, rtol=1e-5)


def test_shards_that_are_not_needed_may_be_missing(
    transformer, vae, text_encoder, tokenizer, original, original_vae, original_text, tmp_path
):
    """With a checkpoint they are not fetched from the hub, but the index is."""
    save_shards(original(transformer.state_dict()), tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    torch.save(original_vae(vae), tmp_path / "b.pth")
    torch.save(original_text(text_encoder), tmp_path / "c.pth")
    tokenizer.save_pretrained(tmp_path / "google" / "umt5-xxl")
    with pytest.raises(FileNotFoundError, match="lacks 2 of 2 files"):
        ms.VideoPipeline.from_pretrained(tmp_path, **SETTINGS)
    (tmp_path / "mine").mkdir()
    torch.save(transformer.state_dict(), tmp_path / "mine" / "model.pt")
    ms.VideoPipeline.from_pretrained(tmp_path, checkpoint=tmp_path / "mine" / "model.pt", **SETTINGS)


@pytest.mark.parametrize("heads", [1, 3])
def test_a_checkpoint_of_another_size_is_loaded_over_a_folder(
    heads, transformer, vae, text_encoder, tokenizer, tmp_path
):
    ms.VideoPipeline(transformer, vae, text_encoder, tokenizer, **SETTINGS).save_pretrained(tmp_path / "base")
    size = {"num_attention_heads": heads, "ffn_dim": 48, "num_layers": 3}
    other = type(transformer)(**{**transformer.config, **size})
    torch.save(other.state_dict(), tmp_path / "model.pt")
    pipe = ms.VideoPipeline.from_pretrained(tmp_path / "base", checkpoint=tmp_path / "model.pt")
    assert {name: pipe.transformer.config[name] for name in size} == size
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in pipe.transformer.state_dict().items())


def test_a_checkpoint_takes_what_its_shapes_do_not_tell_from_the_folder(
    transformer, vae, text_encoder, tokenizer, tmp_path
):
    narrow = {"num_attention_heads": 4, "attention_head_dim": 64}
    model = type(transformer)(**{**transformer.config, **narrow})
    ms.VideoPipeline(model, vae, text_encoder, tokenizer, **SETTINGS).save_pretrained(tmp_path / "base")
    torch.save(transformer.state_dict(), tmp_path / "model.pt")
    pipe = ms.VideoPipeline.from_pretrained(tmp_path / "base", checkpoint=tmp_path / "model.pt")
    assert {name: pipe.transformer.config[name] for name in narrow} == narrow


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "vae/config.json"])
def test_damaged_json_is_told_by_its_name(file, transformer, vae, text_encoder, tokenizer, tmp_path):
    ms.VideoPipeline(transformer, vae, text_encoder, tokenizer, **SETTINGS).save_pretrained(tmp_path)
    (tmp_path / file).write_text("[" * 200_000)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        ms.VideoPipeline.from_pretrained(tmp_path, **SETTINGS)


@pytest.mark.parametrize(("channels", "patch"), [(4, 1), (16, 2)])
def test_a_tiny_decoder_of_another_autoencoder_is_refused(channels, patch, transformer, vae, text_encoder, tokenizer):
    decoder = TinyVideoDecoder(channels, patch, (8, 8, 8, 4))
    with pytest.raises(ValueError, match=rf"reads latents of {channels} channels and {8 * patch} pixels .* of 16 ch"):
        ms.VideoPipeline(transformer, vae, text_encoder, tokenizer, decoder=decoder, **SETTINGS)


def test_a_tiny_decoder_with_a_hole_is_refused(tmp_path):
    state = TinyVideoDecoder(4, 1, (8, 8, 8, 4)).state_dict()
    del state["decoder.8.weight"]
    torch.save(state, tmp_path / "taew.pth")
    with pytest.raises(ValueError, match=r"not a whole model: decoder.8.weight is missing"):
        load_tiny_decoder(tmp_path / "taew.pth")


def test_what_it_lacks_is_named(transformer, original, tmp_path):
    torch.save(original(transformer.state_dict()), tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match="has no vae; a model has transformer, vae, text_encoder, tokenizer"):
        ms.VideoPipeline.from_pretrained(tmp_path, **SETTINGS)
