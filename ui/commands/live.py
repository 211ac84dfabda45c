"""`millstream live`: a camera, a video or a stream from the network is redrawn, in a window or a file.

By a world, a video model or a diffusers image pipeline: the model's folder tells which.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from ..live import SteeringWindow, hear, translate
from ..live_image import add_image_options, control_of, is_image_model, load_live_image
from ..video import VIDEO_STRENGTH, add_video_options, is_video_model, load_video
from ..world import attend_as, check_prompt, check_recording, load_world, positive_seconds, say_nearest, scale_of
from .run import VIDEOS, WORLDS, add_world_options

if TYPE_CHECKING:
    from ...pipelines.live_image import LiveImagePipeline
    from ...pipelines.video import VideoPipeline
    from ...pipelines.world import WorldPipeline
    from ...streaming import Camera, NetworkCamera, Session, Source, VideoFile, VirtualCamera

STRENGTH = 0.4  # by eye: enough to be the world, little enough to follow the camera
IMAGE_STRENGTH = 0.5  # of an image pipeline's steps, which are few
IMAGES = "image pipelines"
READERS = {  # of the options that not every model reads, who does
    **dict.fromkeys(("follow_motion", "stream_batch"), (WORLDS,)),
    **dict.fromkeys(("skip_similar", "steps"), (WORLDS, IMAGES)),
    **dict.fromkeys(("preset", "attention"), (WORLDS, VIDEOS)),
    **dict.fromkeys(("recipe", "checkpoint", "lora", "decoder"), (VIDEOS,)),
    **dict.fromkeys(("size", "dtype"), (VIDEOS, IMAGES)),
    **dict.fromkeys(("guidance", "guidance_scale", "negative_prompt", "tiny", "compile"), (IMAGES,)),
}


def add(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "live",
        help="redraw a camera, a video or a network stream while you watch",
        description="For example: millstream live --camera 0 --prompt 'a brick corridor with soldiers', or "
        "millstream live --camera 0 --model PATH --recipe streamdiffusion_v2 --prompt 'a watercolour'",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--camera", type=camera_number, metavar="N", help="a webcam by number (default: 0)")
    source.add_argument("--video", type=Path, metavar="FILE", help="a video file instead of a camera")
    source.add_argument("--url", help="an rtsp://, http:// or https:// stream instead of a camera")
    parser.add_argument("--loop", action="store_true", help="play --video again and again")
    parser.add_argument("--prompt", help="what to draw, in words (a world's default: its first)")
    parser.add_argument("--seconds", type=positive_seconds, help="stop after so long (default: go on)")
    parser.add_argument("-o", "--output", type=Path, metavar="MP4", help="write the picture to a file; no window then")
    parser.add_argument("--virtual-camera", action="store_true", help="offer the picture to other programs; no window")
    parser.add_argument("--window", action="store_true", help="open a window besides -o or --virtual-camera")
    parser.add_argument(
        "--strength",
        type=share,
        help=f"0 keeps the picture, 1 ignores it (default: {STRENGTH} for worlds, {IMAGE_STRENGTH} for image pipelines,"
        f" {VIDEO_STRENGTH} for video models)",
    )
    worlds = parser.add_argument_group("worlds")
    worlds.add_argument("--follow-motion", type=share, default=0.0, help="share of it that fast motion takes off")
    worlds.add_argument("--skip-similar", type=share, help="likeness above which pictures may be skipped: 0.98")
    worlds.add_argument("--stream-batch", action="store_true", help="several frames in one pass: faster, a bit later")
    add_world_options(parser)
    add_video_options(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def camera_number(text: str) -> int:
    """For `argparse`: 0, 1, ..."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be the number of a camera, 0 for the first, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """For `argparse`: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Refuse what can be refused before the model is loaded; then go."""
    from ...streaming import VideoFile

    kind = kind_of(arguments)
    settings = check(arguments, kind)
    with ExitStack() as at_end, ExitStack() as if_refused:
        source = open_source(arguments)
        if_refused.callback(source.close)
        window, virtual = open_views(arguments, if_refused)
        pipe = load(arguments, kind, settings)
        prompt = arguments.prompt or pipe.worlds[0]
        import torch

        generator = torch.Generator().manual_seed(arguments.seed)
        session = at_end.enter_context(pipe.stream(prompt, generator=generator, **settings))
        if_refused.pop_all()  # from here on `live` or `translate` closes them
        if isinstance(source, VideoFile) and arguments.output is not None and window is None and virtual is None:
            translate(pipe, source, session, arguments.output, seconds=arguments.seconds)
            return 0
        return go(arguments, pipe, source, session, window, virtual)


def kind_of(arguments: argparse.Namespace) -> str:
    """Who is asked to draw, by what the model's folder says."""
    if is_video_model(arguments):
        return VIDEOS
    return IMAGES if is_image_model(arguments.model) else WORLDS


def load(arguments: argparse.Namespace, kind: str, settings: dict[str, Any]) -> Any:
    """The pipeline, on its device, ready for a session with `settings`."""
    if kind == VIDEOS:
        return load_video(arguments)
    if kind == IMAGES:
        from ...streaming import ImageControl

        return load_live_image(arguments, ImageControl(**settings))
    pipe = load_world(arguments.model, arguments.device, arguments.preset)
    attend_as(pipe, arguments.attention)
    say_nearest(pipe, arguments.prompt or pipe.worlds[0])
    return pipe


def check(arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    """What the session is opened with, if everything that was asked for goes together."""
    from ...pipelines.presets import find_preset

    for option, readers in READERS.items():
        if getattr(arguments, option) and kind not in readers:
            raise ValueError(f"--{option.replace('_', '-')} is for {' and '.join(readers)}; this model is none of them")
    if arguments.prompt is not None:
        check_prompt(arguments.prompt)
    elif kind != WORLDS:
        raise ValueError(f"{kind} have no world of their own to fall back on; say what to draw with --prompt")
    if arguments.preset is not None:
        find_preset(arguments.preset)
    if arguments.loop and arguments.video is None:
        raise ValueError("--loop needs --video: only a file has an end to begin again from")
    if arguments.loop and arguments.output is not None and arguments.seconds is None:
        raise ValueError("--loop with -o would never end; say how long with --seconds")
    settings = {WORLDS: world_settings, VIDEOS: video_settings, IMAGES: image_settings}[kind](arguments)
    if arguments.output is not None:
        check_recording(arguments.output)
    return settings


def world_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a world's session is opened with."""
    from ...streaming import WorldControl

    settings: dict[str, Any] = {
        "num_inference_steps": arguments.steps,
        "strength": STRENGTH if arguments.strength is None else arguments.strength,
        "stream_batch": arguments.stream_batch,
        "skip_similar": arguments.skip_similar,
        "follow_motion": arguments.follow_motion,
    }
    WorldControl(**settings)
    return settings


def video_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a video model's session is opened with: its recipe says the rest."""
    return {"strength": VIDEO_STRENGTH if arguments.strength is None else arguments.strength}


def image_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What an image pipeline's session is opened with."""
    from ...streaming.snapshot import control_fields

    control = control_of(arguments, IMAGE_STRENGTH if arguments.strength is None else arguments.strength)
    return {name: value for name, value in control_fields(control).items() if name not in ("prompt", "version")}


def open_source(arguments: argparse.Namespace) -> Camera | VideoFile | NetworkCamera:
    """The camera, file or address that was named."""
    from ...streaming import Camera, NetworkCamera, VideoFile

    if arguments.video is not None:
        return VideoFile(arguments.video, loop=arguments.loop)
    return Camera(arguments.camera or 0) if arguments.url is None else NetworkCamera(arguments.url)


def open_views(
    arguments: argparse.Namespace, if_refused: ExitStack
) -> tuple[SteeringWindow | None, VirtualCamera | None]:
    """Where the picture is seen at once: a window, unless it goes elsewhere; a virtual camera, if asked for."""
    from ...streaming import VirtualCamera

    virtual = VirtualCamera() if arguments.virtual_camera else None
    if arguments.window or not (arguments.output or arguments.virtual_camera):
        window = SteeringWindow()
        if_refused.callback(window.close)
        return window, virtual
    return None, virtual


def go(
    arguments: argparse.Namespace,
    pipe: WorldPipeline | VideoPipeline | LiveImagePipeline,
    source: Source,
    session: Session,
    window: SteeringWindow | None,
    virtual: VirtualCamera | None,
) -> int:
    """Run the live loop until the source, the window, the clock or Ctrl-C ends it, and say how it went."""
    from ...streaming import Recorder, Sink, Steady, Tee, live

    sinks: list[Sink] = [sink for sink in (window, virtual) if sink is not None]
    recorder = None
    if arguments.output is not None:
        recorder = Recorder(arguments.output, rate=pipe.rate, scale=scale_of(pipe.size))
        sinks.append(Steady(recorder, rate=pipe.rate))
    if window is not None:
        worlds = getattr(pipe, "worlds", ())
        window.steers(session, worlds)
        print(f"{'1 to 9: another world; ' if worlds else ''}up and down: strength; Esc: quit")
    if sys.stdin is not None and sys.stdin.isatty():
        print("type a prompt, or a strength from 0 to 1, and press Enter to change it")
        Thread(target=hear, args=(sys.stdin, session), name="millstream-terminal", daemon=True).start()
    metrics = live(source, session, Tee(*sinks), until=arguments.seconds)
    print(metrics.status())
    if recorder is not None and recorder.frames:
        print(f"{recorder.path}: {recorder.frames} frames ({recorder.frames / recorder.rate:.1f} s)")
    if metrics.ended == "interrupt":
        raise KeyboardInterrupt
    return 0
