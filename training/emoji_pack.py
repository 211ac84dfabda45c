"""Put a trained codec and token model into one folder that `ImagePipeline.from_pretrained` loads, packed to int8.

millstream train emoji-pack --codec runs/emoji-codec --model runs/emoji --out runs/emoji-packed
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from ..models.text_encoder import ByteTextEncoder
from ..models.token_transformer import TokenTransformer
from ..models.vq_codec import VQAutoencoder
from ..pipelines.image import ImagePipeline
from ..samplers import TokenSampler
from .pack import pack


def assemble(codec: Path, model: Path, sampler: TokenSampler) -> ImagePipeline:
    """The pipeline of two trained folders, in float32."""
    return ImagePipeline(
        TokenTransformer.from_pretrained(model / "transformer", torch_dtype=torch.float32).eval(),
        VQAutoencoder.from_pretrained(codec, torch_dtype=torch.float32).eval(),
        ByteTextEncoder.from_pretrained(model / "text_encoder", torch_dtype=torch.float32).eval(),
        sampler,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="millstream train emoji-pack", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--codec", type=Path, required=True, help="folder of the trained codec")
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained token model")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--order", default="random", choices=("random", "masked", "raster"))
    parser.add_argument("--curve", default="arccos", choices=("arccos", "cosine", "linear"), help="of order random")
    parser.add_argument("--sampler-steps", type=int, default=16)
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="1 is none")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0, help="leave out the unlikeliest tokens")
    arguments = parser.parse_args(argv)
    sampler = TokenSampler(
        num_inference_steps=arguments.sampler_steps,
        order=arguments.order,
        guidance_scale=arguments.guidance_scale,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        curve=arguments.curve,
    )
    # It has the same three parts as a world, and is saved the same way.
    pack(cast("Any", assemble(arguments.codec, arguments.model, sampler)), arguments.out)
    weights = sum(file.stat().st_size for file in arguments.out.rglob("*.safetensors"))
    print(f"{arguments.out}: {weights:,} bytes of weights")


if __name__ == "__main__":
    main()
