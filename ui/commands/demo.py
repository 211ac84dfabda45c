"""`millstream demo`: a scripted walk through the world that ships, into another world half-way."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..keys import KeyScript
from ..world import attend_as, check_recording, load_world, positive_seconds, record
from .run import add_world_options

PROMPTS = ("a tan brick hall with pink worms and demons", "a grey stone maze on green slime with medkits")
SEED = 0  # one that shows both worlds; from others the second may begin as a bare wall (see the model card)
WALK = (
    "KeyW*24 KeyW+ArrowLeft*10 KeyW*16 Space*6 -*4 KeyW+ArrowRight*14 KeyW*20 ArrowRight*8 KeyW+Space*8 KeyD*8 "
    "KeyW*18 KeyW+ArrowLeft*16 KeyA*8 KeyW*12 -*3"
)


def add(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("demo", help="write 20 seconds of a neural Freedoom world to demo.mp4")
    parser.add_argument("--seconds", type=positive_seconds, default=20.0, help="default: 20")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo.mp4"), help="default: %(default)s")
    add_world_options(parser)
    parser.set_defaults(run=run, seed=SEED)


def run(arguments: argparse.Namespace) -> int:
    """Walk, switch, walk on."""
    import torch

    check_recording(arguments.output)
    pipe = load_world(arguments.model, arguments.device)
    attend_as(pipe, arguments.attention)
    script = KeyScript.parse(WALK, pipe.key_map)
    frames = max(2, round(arguments.seconds * pipe.rate))
    first, second = PROMPTS
    print(f'"{first}", then "{second}"')
    generator = torch.Generator().manual_seed(arguments.seed)
    with pipe.stream(first, generator=generator, num_inference_steps=arguments.steps) as session:
        record(session, arguments.output.resolve(), script, frames, switches={frames // 2: second})
    return 0
