"""Put a trained codec and world into one folder that `WorldPipeline.from_pretrained` loads, weights packed to int8.

millstream train pack --data data/freedoom --codec runs/codec --world runs/fast --out runs/freedoom
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ..models.frame_codec import FrameAutoencoder
from ..models.text_encoder import ByteTextEncoder
from ..models.transformer import CausalTransformer3DModel
from ..pipelines.world import WorldPipeline
from ..samplers import FlowSampler
from .dataset import Episodes
from .environments import RATE
from .prompts import world_named
from .world import WINDOW

KEYS = {
    "KeyW": "MOVE_FORWARD",
    "KeyS": "MOVE_BACKWARD",
    "KeyA": "MOVE_LEFT",
    "KeyD": "MOVE_RIGHT",
    "ArrowUp": "MOVE_FORWARD",
    "ArrowDown": "MOVE_BACKWARD",
    "ArrowLeft": "TURN_LEFT",
    "ArrowRight": "TURN_RIGHT",
    "Space": "ATTACK",
}


def key_map(buttons: Sequence[str]) -> dict[str, str]:
    """A key for each button: `KEYS` for Doom's, the digits in order for an environment's numbered actions."""
    known = {key: button for key, button in KEYS.items() if button in buttons}
    return known or {f"Digit{number}": button for number, button in zip("1234567890", buttons)}


def assemble(codec: Path, world: Path, episodes: Episodes, sampler: FlowSampler) -> WorldPipeline:
    """The pipeline of two trained folders, in float32."""
    return WorldPipeline(
        CausalTransformer3DModel.from_pretrained(world / "transformer", torch_dtype=torch.float32).eval(),
        FrameAutoencoder.from_pretrained(codec, torch_dtype=torch.float32).eval(),
        ByteTextEncoder.from_pretrained(world / "text_encoder", torch_dtype=torch.float32).eval(),
        sampler,
        worlds=[world_named(name).caption for name in episodes.names],
        buttons=list(episodes.buttons),
        key_map=key_map(episodes.buttons),
        size=list(episodes.size),
        rate=RATE,
        window=WINDOW.frames,
    )


def pack(pipe: WorldPipeline, out: Path) -> None:
    """Save `pipe` to `out`, every part's weights as int8 with one scale per output channel."""
    pipe.save_pretrained(out)
    for name in ("transformer", "codec", "text_encoder"):
        for whole in (out / name).glob("*.safetensors"):
            whole.unlink()
        getattr(pipe, name).save_packed(out / name)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="millstream train pack", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of shards, for the names of worlds and buttons"
    )
    parser.add_argument("--codec", type=Path, required=True, help="folder of the trained codec")
    parser.add_argument("--world", type=Path, required=True, help="folder of the trained (or distilled) world")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--sampler-steps", type=int, default=2)
    parser.add_argument("--shift", type=float, default=3.0, help="warps the levels towards the noisy end")
    parser.add_argument("--rule", default="renoise", help="how a step moves the sample; see samplers.FlowSampler")
    parser.add_argument("--context-sigma", type=float, default=0.1, help="level at which finished frames are shown")
    arguments = parser.parse_args(argv)
    sampler = FlowSampler(
        num_inference_steps=arguments.sampler_steps,
        shift=arguments.shift,
        rule=arguments.rule,
        context_sigma=arguments.context_sigma,
    )
    pack(assemble(arguments.codec, arguments.world, Episodes.open(arguments.data), sampler), arguments.out)


if __name__ == "__main__":
    main()
