"""`millstream play`: walk through a world in a window."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..window import Window
from ..world import attend_as, check_prompt, load_world, say_nearest
from .run import add_world_options

if TYPE_CHECKING:
    from ...pipelines.world import WorldPipeline
    from ...streaming import Chunk, Recorder

REMEMBERED_CONTROLS = 256  # far more than can be steered while one frame is drawn


def add(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("play", help="walk through a world in a window, with the keyboard")
    parser.add_argument("prompt", nargs="?", help="the world, in words (default: the model's first)")
    add_world_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Open the window first: a machine without a screen is told so before anything is loaded."""
    if arguments.prompt is not None:
        check_prompt(arguments.prompt)
    window = Window("millstream")
    try:
        pipe = load_world(arguments.model, arguments.device)
        attend_as(pipe, arguments.attention)
        prompt = arguments.prompt or pipe.worlds[0]
        say_nearest(pipe, prompt)
        print(help_text(pipe))
        game = Game(pipe, window, prompt, steps=arguments.steps, seed=arguments.seed)
        try:
            while not window.closed:
                game.turn()
        finally:
            game.close()
    finally:
        window.close()
    return 0


def help_text(pipe: WorldPipeline) -> str:
    """Which key does what, a line each."""
    moves = [f"  {code:12}{button}" for code, button in pipe.key_map.items()]
    worlds = [f"  {number:<12}{world}" for number, world in enumerate(pipe.worlds[:9], start=1)]
    return "\n".join(
        [*moves, *worlds, "  R           begin anew", "  O           record, stop recording", "  Esc         quit"]
    )


class Game:
    """One player in one world: hears the window's keys, steers the session, shows and records what it draws."""

    def __init__(self, pipe: WorldPipeline, window: Window, prompt: str, *, steps: int | None, seed: int) -> None:
        import torch

        self.pipe = pipe
        self.window = window
        generator = torch.Generator().manual_seed(seed)
        self.session = pipe.stream(prompt, generator=generator, num_inference_steps=steps)
        self.recorder: Recorder | None = None
        self._steered: tuple[frozenset[str], str] = (frozenset(), prompt)
        self._controls = {self.session.control.version: self._caption()}

    def turn(self) -> None:
        """Hear, steer, draw and show one step."""
        _, prompt = self._steered
        for key in self.window.presses():
            if key == "KeyR":
                self.session.reset()
            elif key == "KeyO":
                self.toggle_recording()
            elif key.startswith("Digit") and 0 < int(key[-1]) <= len(self.pipe.worlds):
                prompt = self.pipe.worlds[int(key[-1]) - 1]
        self.steer(self.window.keys & self.pipe.key_map.keys(), prompt)
        for chunk in self.session.step():
            self.show(chunk)

    def steer(self, keys: frozenset[str], prompt: str) -> None:
        """Tell the session what changed, and remember its version so that a frame can say what it was drawn under."""
        if (keys, prompt) == self._steered:
            return
        self._steered = (keys, prompt)
        self._controls[self.session.steer(keys=keys, prompt=prompt)] = self._caption()
        if len(self._controls) > REMEMBERED_CONTROLS:
            del self._controls[next(iter(self._controls))]

    def show(self, chunk: Chunk) -> None:
        """Put a chunk in the window and, while recording, in the file."""
        recording = "REC   " if self.recorder else ""
        self.window.caption = recording + self._controls.get(chunk.version, "")
        self.window.write(chunk)
        self.session.metrics.delivered(chunk)
        if self.recorder and chunk.kind == "video":
            self.recorder.write(chunk)

    def toggle_recording(self) -> None:
        """Begin a new file in the working directory, or finish the one that is being written."""
        from ...streaming import Recorder

        if self.recorder is None:
            path = Path(time.strftime("millstream-%Y%m%d-%H%M%S.mp4"))
            self.recorder = Recorder(path, rate=self.pipe.rate, scale=4)
            print(f"recording to {path}")
            return
        self.recorder.close()
        print(f"{self.recorder.path}: {self.recorder.frames} frames")
        self.recorder = None

    def close(self) -> None:
        """Finish the recording, if there is one, and give the session back."""
        try:
            if self.recorder is not None:
                self.toggle_recording()
        finally:
            self.session.close()

    def _caption(self) -> str:
        keys, prompt = self._steered
        return f"{'+'.join(sorted(keys)) or 'no key'}   {prompt}"
