"""What happens around a chunk: prompts that change, pictures that come in, frames that go out, streams put back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Self

from ..models.stream_codec import PICTURES_PER_LATENT
from ..streaming import Chunk, Frame, Session, VideoControl
from ..streaming.types import Leaves, Switch, stronger
from .inputs import FULL_MOTION, NEW_MOTION
from .timeline import Script
from .video_draw import VideoDrawer
from .video_state import Finished, VideoState, from_leaves, part


class VideoStreamer(VideoDrawer):
    """The part of a video pipeline that keeps a stream's state in order."""

    rate: float
    overlap: bool
    _beside: torch.cuda.Stream | None  # where chunks are drawn while others are decoded
    _caller: torch.cuda.Stream | None  # where they are decoded meanwhile

    def resize(self, height: int, width: int) -> None:
        """Draw pictures of another size from now on.

        Raises:
            ValueError: a size that does not fill whole tokens, or sessions are open.
        """
        _, patch_h, patch_w = self.transformer.config["patch_size"]
        pixels = self.vae.config["scale_factor_spatial"]
        rows, columns = patch_h * pixels, patch_w * pixels
        if height % rows or width % columns or min(height, width) < 1:
            raise ValueError(f"pictures are multiples of {rows} x {columns} pixels, got {height} x {width}")
        if self._size == (height, width):
            return
        self._check_idle("be drawn in another size")
        self._size, self._arena, self._still = (height, width), None, None
        self.register_to_config(size=[height, width])

    def _check_idle(self, wish: str) -> None:
        if self._arena is not None and self._arena.in_use:
            raise ValueError(
                f"{self._arena.in_use // self.recipe.rows} open session(s) of this pipeline live in memory of its "
                f"present size and place; close them (session.close()) before it can {wish}"
            )

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the weights as diffusers does. ValueError while sessions are open: their memory would stay behind.

        Under a preset such as `small` the text encoder stays on the host; a dtype is given to it all the same.
        """
        self._check_idle("move")
        self._arena = self._still = None
        with self._reading:
            reader = self.text_encoder if self.preset.text_on_host else None
            if reader is None:
                return super().to(*args, **kwargs)
            self.register_modules(text_encoder=None)
            try:
                super().to(*args, **kwargs)
            finally:
                self.register_modules(text_encoder=reader)
            for dtype in [each for each in (*args, *kwargs.values()) if isinstance(each, torch.dtype)]:
                reader.to(dtype)  # pyright: ignore[reportCallIssue, reportArgumentType]  (wrapped)
            return self

    def fresh(self, seed: int) -> VideoState:
        """A stream with nothing in it; the arena follows the weights to another device while nothing runs."""
        model = self.transformer
        with self._sharing:
            if not self.arena.in_use and (self.arena.device, self.arena.dtype) != (model.device, model.dtype):
                self._arena = None
            channels, height, width = self.latent_size
            history = torch.zeros((channels, self.recipe.window, height, width), device=model.device)
            with self.apart():
                rows = [self.arena.take() for _ in range(self.recipe.rows)]
                self.arena.recordings.follow(list(model.parameters()))
                if rows[0] not in self.arena.codecs:
                    self.arena.codecs[rows[0]] = self._decoder.begin(*self.size)
                decoding = self.arena.codecs[rows[0]]
                decoding.reset()
                return VideoState(rows, seed, decoding, history)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within: what steps work on may be touched outside of a step, on the caller's CUDA stream."""
        if self._beside is None:
            yield
            return
        caller = torch.cuda.current_stream(self._beside.device)
        caller.wait_stream(self._beside)
        yield
        self._beside.wait_stream(caller)

    # Prompts

    def obey(self, state: VideoState, control: VideoControl, when: float) -> list[Chunk]:
        """Let the prompt be what `control` says, in the way it says; returns what had to be finished before."""
        chunks: list[Chunk] = []
        if self.is_game:
            self.hear(state, control)
            return chunks
        switch = self.due(state, control)
        state.heard, state.pending = control.version, None
        if control.prompt != state.prompt or switch in ("cut", "recache"):
            if switch == "cut" or (switch == "recache" and self.recipe.plan == "batch"):
                chunks = self.settled(state)
                chunks += [self.shown(state, each, when) for each in self.complete(state)]
                if self._caller is not None:  # what was just decoded is not to be overwritten
                    torch.cuda.current_stream(self.arena.device).wait_stream(self._caller)
            text = state.text if state.target is None else state.target
            if text is None or control.prompt != state.prompt:
                text = self.read_prompt(control.prompt).to(self.arena.device, self.arena.dtype)
            if switch == "lerp":
                state.origin, state.target, state.blend = state.text, text, 0
            else:
                state.origin = state.target = None
                self._say(state, text)
            state.prompt = control.prompt
            if switch == "cut":
                self._cut(state)
            elif switch == "recache" and state.shot:
                if self.recipe.overlap:
                    self.begin_anew(state)
                else:
                    self.replay(state)
        if state.target is not None:
            self._say(state, self.blended(state, self.recipe.blend))
        return chunks

    def due(self, state: VideoState, control: VideoControl) -> Switch:
        """What is to happen to the memory now: each switch that was steered counts once."""
        if state.prompt is None:
            return "keep"
        steered: Switch = "keep" if control.version == state.heard else control.switch
        return stronger(steered, cast("Switch", state.pending or "keep"))

    def _say(self, state: VideoState, text: Tensor) -> None:
        """Let all rows of a stream attend to these tokens [S, D] from the next pass on."""
        state.text = text
        for row in state.rows:
            self.arena.read_prompt(row, text[None])

    def _cut(self, state: VideoState) -> None:
        """A new shot: nothing is remembered, and its first frame is a first frame."""
        self.forget(state)
        state.shot = 0
        state.decoding.reset()
        state.encoding = state.waiting = None  # an input's next picture is a first picture too

    # Pictures

    def start_from(self, state: VideoState, image: Tensor, control: VideoControl) -> None:
        """Let a stream that has just begun show `image` [3, H, W] first."""
        with self._sharing, torch.no_grad(), self.apart():
            if self.is_game:
                self.begin_scene(state, *self.see(image))
                return
            self.obey(state, control, 0.0)
            self.show(state, self.encode_still(image))

    def begin_scene(self, state: VideoState, tokens: Tensor, scene: Tensor) -> None:
        """Let a stream that is played begin with what `see` saw."""
        state.scene = scene.to(self.arena.device)
        self._say(state, tokens.to(self.arena.device, self.arena.dtype))

    def check_input(self, control: VideoControl, picture: Tensor) -> None:
        """Refuse what can't be redrawn; called before any stream moves, so that a bad picture costs others nothing."""
        if tuple(picture.shape) != (3, *self.size) or not picture.is_floating_point():
            raise ValueError(
                f"a picture of this pipeline is [3, {self.size[0]}, {self.size[1]}] in floats from 0 to 1, got "
                f"{list(picture.shape)} in {picture.dtype}"
            )
        recipe = self.recipe
        if self.is_game:
            raise ValueError("a world that is played redraws no video: give the picture that it begins with as image=")
        if recipe.plan == "triangle":
            raise ValueError(f"recipe {recipe.name!r} draws from prompts alone; to redraw a video, take another recipe")
        least = recipe.told_less + recipe.motion + (recipe.sigmas()[1] if recipe.plan == "batch" else 0.0)
        if control.strength < least:
            raise ValueError(f"recipe {recipe.name!r} redraws with strength {least:g} or more, got {control.strength}")

    def take_in(self, state: VideoState, picture: Tensor) -> Tensor | None:
        """Encode the next picture [3, H, W] of an input: the latents of a chunk [C, F, h, w] once they are complete."""
        if self.recipe.motion:
            state.fastest = max(state.fastest, difference(picture, state.seen))
            state.seen = picture
        if state.encoding is None:
            state.encoding = self._encoder.begin(*self.size)
            if state.shot:  # which has its first frame: all that come now stand for 4 pictures each
                self._encoder.encode(picture[None, None].to(self.arena.device), state.encoding)
                if state.still is not None:
                    return None  # the picture that the stream starts from stands in this one's place
        latents = self._encoder.encode(picture[None, None].to(self.arena.device), state.encoding)[0].float()
        if state.waiting is not None:
            latents = torch.cat([state.waiting, latents], dim=1)
        size = self.recipe.chunk
        whole = latents.shape[1] >= size
        rest = latents[:, size:] if whole else latents
        state.waiting = rest if rest.shape[1] else None
        if not whole:
            return None
        state.motion = NEW_MOTION * state.fastest + (1 - NEW_MOTION) * state.motion
        state.fastest = 0.0
        return latents[:, :size]

    @property
    def pictures_per_chunk(self) -> int:
        """Pictures of an input that a chunk takes.

        The first chunk of a stream takes `PICTURES_PER_LATENT` - 1 less; or 1 more where the stream starts from a
        picture, which stands in the place of the input's first.
        """
        return PICTURES_PER_LATENT * self.recipe.chunk

    def shown(self, state: VideoState, done: Finished, when: float) -> Chunk:
        """A finished chunk, decoded, on the caller's CUDA stream where chunks are drawn on another."""
        latents = done.latents
        with nullcontext() if self._caller is None else torch.cuda.stream(self._caller):
            if self._caller is not None and self._beside is not None:
                self._caller.wait_event(state.drawn or self._beside.record_event())
                latents.record_stream(self._caller)
            pictures = self.decode(state, latents)
        start, state.pictures = state.pictures, state.pictures + len(pictures)
        return Chunk("video", pictures, start, self.rate, done.version, when)

    def settled(self, state: VideoState) -> list[Chunk]:
        """What was drawn and waits to be decoded."""
        if state.ahead is None:
            return []
        done = Finished(state.ahead, state.ahead_version)
        state.ahead = None
        chunks = [self.shown(state, done, state.ahead_time)]
        state.drawn = None
        return chunks

    def begun(self, state: VideoState) -> int:
        """How many pictures a stream has made or is making."""
        flying = sum(each.shape[1] for each in (state.flying, state.ahead, state.still) if each is not None)
        first = PICTURES_PER_LATENT - 1 if state.decoding.frames == 0 and flying else 0
        return state.pictures + PICTURES_PER_LATENT * flying - first

    def drain(
        self,
        session: Session[VideoState, VideoControl],
        num_frames: int,
        media: Iterator[Tensor] | None = None,
        timeline: Script | None = None,
    ) -> Iterator[Sequence[Chunk]]:
        """Step `session` until so many pictures are begun or `media` [3, H, W] end, then finish what is under way.

        Yields what each step gives, perhaps nothing.
        """
        begun, follow = 0, None if timeline is None else timeline.follow(session)
        while begun < num_frames:
            if follow is not None:
                follow(begun / self.rate)
            picture = None if media is None else next(media, None)
            if media is not None and picture is None:
                break
            yield session.step(None if picture is None else Frame(picture, time.monotonic()))
            begun = 0 if session.state is None else self.begun(session.state)
        yield session.flush()

    # Snapshots

    def put_back(self, state: VideoState, leaves: Leaves) -> None:
        """Make a fresh state what `leaves` say, which were checked. ValueError if they are another pipeline's."""
        plain = from_leaves(leaves, len(state.rows))
        for number, row in enumerate(state.rows):
            self.arena.cache.restore(row, part(leaves, f"memory.{number}"))
        state.decoding.restore(part(leaves, "decoding"))
        encoding = part(leaves, "encoding")
        if encoding:
            state.encoding = self._encoder.begin(*self.size)
            state.encoding.restore(encoding)
        for name, value in plain.items():
            on_host = name in ("versions", "seen", "pressed")
            setattr(state, name, value.to(self.arena.device) if isinstance(value, Tensor) and not on_host else value)
        if state.text is not None:
            self._say(state, state.text.to(self.arena.dtype))


def difference(picture: Tensor, last: Tensor | None) -> float:
    """From 0 (the same picture) to 1 (a very different one): StreamDiffusionV2 (arXiv 2511.07399), section 3.3."""
    if last is None:
        return 0.0
    return min(1.0, float((picture.float() - last.float()).square().mean().sqrt()) / FULL_MOTION)
