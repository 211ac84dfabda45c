"""`millstream run`: a prompt becomes an mp4, a walk through a world by a key script or a clip of a video model."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..keys import KeyScript
from ..video import SECONDS, VIDEO_STRENGTH, add_video_options, is_video_model, run_video
from ..video_keys import is_played
from ..world import (
    attend_as,
    check_prompt,
    check_recording,
    load_world,
    positive_integer,
    positive_seconds,
    record,
    say_nearest,
    seed_integer,
)

WORLDS, VIDEOS, PLAYED = "worlds", "video models", "video models that are played"
READERS = {  # of the options that not every model reads, who does
    "keys": (WORLDS, PLAYED),
    "steps": (WORLDS,),
    **dict.fromkeys(("recipe", "checkpoint", "lora", "decoder", "size", "dtype", "image"), (VIDEOS, PLAYED)),
    **dict.fromkeys(("video", "strength", "timeline"), (VIDEOS,)),
}


def add(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "run",
        help="walk through a world by a key script and write an mp4",
        description='For example: millstream run "a brick corridor" --keys "KeyW*40 ArrowLeft*20 KeyW+Space*10"',
    )
    parser.add_argument("prompt", nargs="?", help="the world or the clip, in words; not with --timeline")
    parser.add_argument(
        "--keys",
        metavar="SCRIPT",
        help="worlds and played video models: KEY[+KEY]*FRAMES, separated by spaces, repeated to the end; "
        '"-" is no key (default: KeyW)',
    )
    parser.add_argument(
        "--image", type=Path, help="video models: what the first picture shows (of one that is played: must be given)"
    )
    parser.add_argument("--video", type=Path, help="video models: a video to redraw")
    parser.add_argument(
        "--strength", type=float, help=f"how far, from 0 (kept) to 1 (ignored); default: {VIDEO_STRENGTH}"
    )
    parser.add_argument("--timeline", type=Path, help="video models: prompts at times, a JSON file, instead of PROMPT")
    parser.add_argument(
        "--seconds", type=positive_seconds, help=f"length of the clip (default: {SECONDS:g}, or all of --video)"
    )
    parser.add_argument("--frames", type=positive_integer, help="length in frames; overrides --seconds")
    parser.add_argument("-o", "--output", type=Path, default=Path("walk.mp4"), help="default: %(default)s")
    add_world_options(parser)
    add_video_options(parser)
    parser.set_defaults(run=run)


def add_world_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that draws a world."""
    parser.add_argument("--model", default="freedoom", help="a shipped model or a model's folder (default: freedoom)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--attention", help='the planner of self-attention: "window(8,3,3)", "pisa(density=0.3)", ...')
    parser.add_argument("--steps", type=positive_integer, help="sampler steps per frame (default: the model's own)")
    parser.add_argument("--seed", type=seed_integer, default=0, help="same seed and keys, same frames (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Check everything cheap, then load, then walk."""
    videos = is_video_model(arguments, [option for option, readers in READERS.items() if WORLDS not in readers])
    played = videos and is_played(arguments)
    check(arguments, PLAYED if played else VIDEOS if videos else WORLDS)
    if videos:
        return run_video(arguments)
    import torch

    prompt = check_prompt(arguments.prompt)
    check_recording(arguments.output)
    pipe = load_world(arguments.model, arguments.device, arguments.preset)
    attend_as(pipe, arguments.attention)
    script = KeyScript.parse("KeyW" if arguments.keys is None else arguments.keys, pipe.key_map)
    say_nearest(pipe, prompt)
    generator = torch.Generator().manual_seed(arguments.seed)
    frames = arguments.frames or max(1, round((arguments.seconds or SECONDS) * pipe.rate))
    with pipe.stream(prompt, generator=generator, num_inference_steps=arguments.steps) as session:
        record(session, arguments.output, script, frames)
    return 0


def check(arguments: argparse.Namespace, kind: str) -> None:
    """ValueError for an option that this kind of model does not read, and for what it needs and is not given."""
    for option, readers in READERS.items():
        if getattr(arguments, option) is not None and kind not in readers:
            named = [reader for reader in readers if reader != PLAYED or VIDEOS not in readers]
            raise ValueError(f"--{option} is for {' and '.join(named)}; this model is none of them")
    if kind == PLAYED:
        if arguments.prompt:
            raise ValueError("this model is played and reads no words; leave the prompt out, and say --keys")
        if arguments.image is None:
            raise ValueError("a world of this model begins with a picture; give one with --image")
        return
    if arguments.prompt is None and arguments.timeline is None:
        raise ValueError("say what to draw, in words: millstream run PROMPT")
    if arguments.prompt is not None and arguments.timeline is not None:
        raise ValueError("the timeline says what to draw; leave the prompt out, or --timeline")
