"""A video model so small that a chunk takes milliseconds, with random weights under which everything matters."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from millstream.models.transformer import CausalTransformer3DModel
from millstream.pipelines.video import VideoPipeline

WORDS = ["<pad>", "</s>", "<unk>", "a", "corgi", "surfs", "lands", "red", "fox", "in", "snow", "the", "sea"]


def make_tokenizer():
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def make_parts(layers=2):
    """The same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        transformer = CausalTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=layers,
        )
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.0, 0.3],
            latents_std=[1.0, 0.7, 1.3, 0.9],
        )
        config = UMT5Config(vocab_size=len(WORDS), d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
        text_encoder = UMT5EncoderModel(config)
        for name, parameter in transformer.named_parameters():
            if "attn2.to_out.0.weight" in name or "attn1.to_out.0.weight" in name or "to_v.weight" in name:
                parameter.data.mul_(3.0)  # so that words and memory show in the picture
        transformer.proj_out.weight.data.mul_(2.0)
        vae.decoder.conv_out.weight.data.mul_(4.0)
    return {
        "transformer": transformer.eval(),
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": make_tokenizer(),
    }


def make_pipe(recipe="self_forcing", **settings):
    pipe = VideoPipeline(**make_parts(), recipe=recipe, **{"size": (16, 32), "text_length": 8, **settings})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def make():
    return make_pipe


@pytest.fixture
def parts():
    return make_parts


@pytest.fixture
def pipe():
    return make_pipe()


@pytest.fixture
def seeded():
    return lambda seed=0: torch.Generator().manual_seed(seed)
