"""A folder as Wan releases it, without diffusers' layout: the parts are found by what is in the files."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import millstream as ms

SETTINGS = {"recipe": "self_forcing", "size": (16, 32), "text_length": 8}


@pytest.fixture
def tokenizer():
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "corgi": 2, "fox": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def test_it_is_loaded_as_it_is(
    transformer, vae, text_encoder, tokenizer, original, original_vae, original_text, tmp_path
):
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


def test_what_it_lacks_is_named(transformer, original, tmp_path):
    torch.save(original(transformer.state_dict()), tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match="has no vae; a model has transformer, vae, text_encoder, tokenizer"):
        ms.VideoPipeline.from_pretrained(tmp_path, **SETTINGS)
