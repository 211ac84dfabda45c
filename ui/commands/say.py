"""`millstream say`: a text becomes speech, on the speaker where there is one and in a WAV file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..speech import MODEL, load_speech, told
from ..world import seed_integer

if TYPE_CHECKING:
    from ...streaming import Speaker


def add(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "say",
        help="speak a text",
        description='For example: millstream say "hello there, how are you" -o hello.wav',
    )
    parser.add_argument("text", help="what to say, in English")
    parser.add_argument("-o", "--output", type=Path, help="a .wav file; without one there must be a speaker")
    parser.add_argument("--voice", help="a voice of the model, or a .safetensors file of one (default: its first)")
    parser.add_argument("--silent", action="store_true", help="write the file only, as fast as it can be made")
    parser.add_argument("--model", default=MODEL, help="a shipped model or a model's folder (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--seed", type=seed_integer, default=0, help="same seed, same samples (default: 0)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check everything cheap, then load, then speak."""
    import torch

    from ...streaming import SpeechControl, Tee, WavFile, live

    SpeechControl(text=arguments.text)
    if arguments.silent and arguments.output is None:
        raise ValueError("--silent leaves the file only; name it with -o out.wav")
    file = None if arguments.output is None else WavFile(arguments.output)
    aloud = None if arguments.silent else speaker(needed=file is None)
    sink = Tee(*(sink for sink in (file, aloud) if sink is not None))
    sink.paces = True  # the speaker is the clock, and a file wants none
    pipe = load_speech(arguments.model, arguments.device)
    generator = torch.Generator().manual_seed(arguments.seed)
    with pipe.stream(arguments.text, voice=arguments.voice, generator=generator) as session:
        metrics = live(None, session, sink)
    written = f"{arguments.output}: {file.seconds:.1f} s · " if file is not None and file.samples else ""
    print(written + told(metrics))
    if metrics.ended == "interrupt":
        raise KeyboardInterrupt
    return 0


def speaker(*, needed: bool) -> Speaker | None:
    """This machine's speaker; None where there is none and none is needed.

    Raises:
        ImportError, OSError: it is needed; says what is missing.
    """
    from ...streaming import Speaker

    try:
        return Speaker()
    except (ImportError, OSError):
        if needed:
            raise
        return None
