"""Diffusers' pipelines so small that a picture takes milliseconds; their weights are random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def small_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's, of single letters."""
    words = ["<|startoftext|>", "<|endoftext|>"] + [
        c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")
    ]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def small_text(kind: type = CLIPTextModel) -> Any:
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return kind(config).eval()


def small_vae(channels: int = 4) -> AutoencoderTiny:
    sides = (8, 8, 8, 8)
    return AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=sides,
        decoder_block_out_channels=sides,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).eval()


@pytest.fixture
def make_vae() -> Callable[..., AutoencoderTiny]:
    """`make_vae(channels=4)`."""
    return small_vae


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionImg2ImgPipeline:
    """SD in the small, on 64 x 64 pixels, with Turbo's scheduler but for the noise between steps. Do not change it."""
    torch.manual_seed(0)
    return StableDiffusionImg2ImgPipeline(
        vae=small_vae(),  # pyright: ignore[reportArgumentType]  (any autoencoder will do)
        text_encoder=small_text(),
        tokenizer=small_tokenizer(tmp_path_factory.mktemp("clip")),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
        ).eval(),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing"),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
