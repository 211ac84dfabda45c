"""What runs before and beside a stream: the warm-up, and decoding while the next chunk is already drawn.

A chunk is drawn on a CUDA stream of the pipeline's own while the chunk before it is decoded on the caller's. So a step
gives what the step before it has drawn, and waits for nothing else; the first one waits for its own, so that the first
picture comes as early as ever. The numbers are those of a stream that decodes at once: only the order of work differs.
On other devices that order is kept too, so that it can be tested anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..streaming import Chunk, Frame, VideoControl
from ..streaming.graphs import fastest_convolutions
from .video_state import Finished, VideoState
from .video_stream import VideoStreamer


class AheadStreamer(VideoStreamer):
    """The part of a video pipeline that decides when a chunk is drawn and when it is decoded."""

    def _advance(self, state: VideoState, control: VideoControl, frame: Frame | None) -> list[Chunk]:
        state.finished = [] if state.still is None else [state.still]
        when = time.monotonic() if frame is None else frame.time
        with self.drawing(None if frame is None else frame.data):
            cut = frame is not None and self.due(state, control) == "cut"
            chunks = self.obey(state, control, when) if cut else []  # before its first picture is encoded
            given = None if frame is None else self.take_in(state, frame.data)
            if frame is not None and given is None:
                state.pending = None if cut else self.due(state, control)
                state.heard = control.version
                return chunks
            if not cut:
                chunks = self.obey(state, control, when)
            done = self.draw(state, given, control.strength, control.version)
            if self.overlap and not self.recipe.overlap:  # whose memory needs the pictures
                return chunks + self._behind(state, done, when)
            return chunks + [self.shown(state, each, when) for each in done]

    def _behind(self, state: VideoState, done: list[Finished], when: float) -> list[Chunk]:
        """Decode what the step before has drawn; the last of `done` waits for the next step."""
        begins = state.pictures == 0 and state.ahead is None
        chunks = self.settled(state)
        chunks += [self.shown(state, each, when) for each in (done if begins else done[:-1])]
        if done and not begins:
            state.ahead, state.ahead_version = done[-1]
            state.ahead_time = when
            state.drawn = None if self._beside is None else self._beside.record_event()
        return chunks

    @contextmanager
    def drawing(self, given: Tensor | None = None) -> Iterator[None]:
        """Within: what is done goes to the pipeline's own CUDA stream; `given` comes from the caller's."""
        device = self.arena.device
        if device.type != "cuda" or not self.overlap:
            yield
            return
        if self._beside is None or self._beside.device != device:
            self._beside = torch.cuda.Stream(device)
            self._beside.wait_stream(torch.cuda.current_stream(device))
        caller, before = torch.cuda.current_stream(device), self._caller
        if given is not None and given.is_cuda:
            self._beside.wait_stream(caller)
            given.record_stream(self._beside)
        self._caller = caller
        try:
            with torch.cuda.stream(self._beside):
                yield
        finally:
            self._caller = before

    @torch.no_grad()
    def warmup(self) -> None:
        """Draw one stream for nobody, under a progress bar, so that no later frame waits.

        Kernels are then compiled, the fastest convolutions found, and on a GPU every step that a stream from a prompt
        can come to is recorded as a CUDA graph: nothing is compiled or allocated afterwards. Without it that happens
        while a stream runs, for what is asked for again and again.
        """
        recipe = self.recipe
        turns = recipe.window + (recipe.window - recipe.sinks + recipe.spare)  # until the ring has come round
        count = -(-turns // recipe.chunk) + recipe.units if self.arena.recordings.records else 2
        control = VideoControl(self.known_prompt())
        if not self.is_game:
            self.read_prompt(control.prompt)
        progress: Any = self.progress_bar  # pyright: ignore[reportAttributeAccessIssue]
        arena = self.arena
        with self._sharing, fastest_convolutions(), arena.recordings.eagerly(), arena.decodings.eagerly():
            state = self.fresh(0)
            try:
                if self.is_game:
                    self.begin_scene(state, *self.nothing_seen())
                for _ in progress(range(count)):
                    self._advance(state, control, None)
                with self.drawing():
                    self.settled(state)
                    self.complete(state)
                    if not recipe.overlap and recipe.plan != "batch" and not self.is_game:
                        self.replay(state)
            finally:
                self.end(state)
