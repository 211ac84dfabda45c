"""Diffusers' own pictures by transformers, called as its users call them: DiT and aMUSEd, with random weights.

Both draw 16 x 16 tokens (DiT: patches) with classifier-free guidance. Neither decodes pixels here: aMUSEd is asked for
its tokens, and DiT, which always decodes, has an autoencoder that gives latents back as they are. aMUSEd is given
prompt embeddings, so that no text is encoded either.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

TEXT_TOKENS, TEXT_DIM = 77, 768  # CLIP's

# As published in the config.json of facebook/DiT-XL-2-256 and amused/amused-256; `tiny` is for trying this file.
DIT: dict[str, dict[str, Any]] = {
    "large": {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28},
    "tiny": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2},
}
DIT_SHAPE: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
AMUSED: dict[str, dict[str, Any]] = {
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 22,
        "num_attention_heads": 16,
        "intermediate_size": 2816,
        "in_channels": 768,
        "block_out_channels": 768,
        "block_num_heads": 12,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "in_channels": 32,
        "block_out_channels": 32,
        "block_num_heads": 2,
    },
}
AMUSED_SHAPE: dict[str, Any] = {
    "sample_size": 16,
    "cond_embed_dim": TEXT_DIM,
    "encoder_hidden_size": TEXT_DIM,
    "vocab_size": 8256,
    "codebook_size": 8192,
}
MASK_TOKEN = 8255


class NoCodec(nn.Module):
    """Gives latents back as they are. Pipelines ask every part where it is."""

    config = SimpleNamespace(scaling_factor=1.0)

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=latents)


def make_peer(name: str, size: str, steps: int, batch: int, device: torch.device, *, compiled: bool) -> tuple[Any, int]:
    """What draws `batch` pictures with pipeline "DiT" or "aMUSEd", and the network's number of parameters."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe, arguments = (_dit if name == "DiT" else _amused)(size, batch, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = pipe.transformer.to(device).to(dtype).eval()
    parameters = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    if compiled:
        pipe.transformer = torch.compile(pipe.transformer, mode="reduce-overhead")

    def draw() -> Tensor:
        return pipe(num_inference_steps=steps, return_dict=False, **arguments)[0]

    return draw, parameters


def _dit(size: str, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    network: Any = DiTTransformer2DModel(**DIT_SHAPE, **DIT[size])
    codec: Any = NoCodec(device)
    scheduler: Any = DDIMScheduler(clip_sample=False)
    pipe = DiTPipeline(network, codec, scheduler)
    labels = [number % 1000 for number in range(batch)]
    return pipe, {"class_labels": labels, "guidance_scale": 4.0, "output_type": "pt"}


def _amused(size: str, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel

    network, nothing = (
        UVit2DModel(**AMUSED_SHAPE, **AMUSED[size]),
        dict.fromkeys(("vqvae", "tokenizer", "text_encoder")),
    )
    pipe: Any = AmusedPipeline(transformer=network, scheduler=AmusedScheduler(MASK_TOKEN), **nothing)  # type: ignore[arg-type]

    def pooled() -> Tensor:
        return torch.randn(batch, TEXT_DIM, device=device, dtype=dtype)

    def every() -> Tensor:
        return torch.randn(batch, TEXT_TOKENS, TEXT_DIM, device=device, dtype=dtype)

    return pipe, {
        "prompt_embeds": pooled(),
        "encoder_hidden_states": every(),
        "negative_prompt_embeds": pooled(),
        "negative_encoder_hidden_states": every(),
        "guidance_scale": 10.0,
        "output_type": "latent",
    }
