"""Live images by any few-step diffusers model: a camera's pictures redrawn as a prompt says, while you watch.

`LiveImagePipeline.from_diffusers(pipe)` takes a text-to-image or image-to-image pipeline's own parts. Every picture is
noised to where `strength` says and denoised step by step; in a stream batch the pictures under way are at different
steps of one pass (Kodaira et al. 2023, StreamDiffusion, arXiv 2312.12491). Frames do not see each other: each is what
the plain call would have made of its picture, its noise and its prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor
from typing_extensions import Self

from ..samplers.schedules import check_count
from ..streaming import Chunk, Frame, ImageControl, Session
from ..streaming.graphs import fastest_convolutions
from ..streaming.types import Leaves
from .inputs import keep_shown, leaves_out, look_at
from .live_draw import USUAL_STRENGTH, ImageDrawer
from .live_lanes import Arriving, Lane
from .live_session import SourceSession, size_of
from .live_state import DrawnFrom, LiveFrame, LiveImageState, from_leaves, to_leaves
from .video_output import is_offloaded

STEPS = {"LCMScheduler": 4, "SCMScheduler": 2}  # unless said otherwise; of other schedulers 2, so that half is 1


class LiveImagePipeline(ImageDrawer):
    """Redraws pictures as they come, or draws from words alone where there are none.

    Made by `from_diffusers` or `from_pretrained`. It holds no state of a stream: that is the session's.
    """

    def __init__(
        self, pipe: Any, size: tuple[int, int], *, steps: int, rate: float, overlap: bool, tiny: Any = None
    ) -> None:
        super().__init__(pipe, size, steps, tiny=tiny, lanes=2 if overlap else 1)
        self.rate, self.overlap = rate, overlap
        self._sharing = RLock()

    @classmethod
    def from_diffusers(
        cls,
        pipe: Any,
        *,
        size: tuple[int, int] | None = None,
        num_inference_steps: int | None = None,
        tiny: Any = None,
        rate: float = 30.0,
        overlap: bool = False,
        compile: bool | str = False,
    ) -> Self:
        """A live pipeline of the parts of a diffusers pipeline, which stay shared with it.

        Args:
            pipe: text-to-image or image-to-image, of Stable Diffusion 1, 2, XL or 3, FLUX or SANA-Sprint.
            size: (height, width) in pixels; what the network was made for by default.
            num_inference_steps: the default of the control's.
            tiny: an `AutoencoderTiny` in the place of the pipeline's autoencoder; the pipeline keeps its own.
            rate: pictures per second that chunks are stamped with.
            overlap: draw two pictures at once and hand out every one a tick later, on the host, so that transfers and
                the caller's work happen beside the drawing; for a second frame's working memory. Without it a chunk's
                picture stays on the device.
            compile: let torch.compile make the kernels, which takes a minute in the first frames; or its mode, of which
                "max-autotune-no-cudagraphs" takes many minutes. Load adapters before.

        Raises:
            ValueError: a pipeline of another kind, parts that are missing, or a size that does not fill whole tokens.
        """
        known = STEPS.get(type(getattr(pipe, "scheduler", None)).__name__, 2)
        steps = check_count(known if num_inference_steps is None else num_inference_steps, "num_inference_steps")
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"rate is pictures per second, above 0, got {rate}")
        if size is not None and not (isinstance(size, Sequence) and len(size) == 2):
            raise ValueError(f"size is (height, width) in pixels, got {size!r}")
        live = cls(pipe, size or size_of(pipe), steps=steps, rate=rate, overlap=overlap, tiny=tiny)
        unit = pipe.vae_scale_factor * live.network.patch
        if any(side < unit or side % unit for side in live.size):
            raise ValueError(f"pictures are multiples of {unit} pixels each way, got {live.size[0]} x {live.size[1]}")
        live.prepare(compiled=compile)
        return live

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, torch_dtype: torch.dtype | None = None, **settings: Any
    ) -> Self:
        """Load a diffusers folder or repository, then `from_diffusers` with `settings`."""
        given = {} if torch_dtype is None else {"torch_dtype": torch_dtype}
        return cls.from_diffusers(
            DiffusionPipeline.from_pretrained(str(pretrained_model_name_or_path), **given), **settings
        )

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the weights as diffusers does; streams that run stay where they are, so open them afterwards."""
        self.pipe.to(*args, **kwargs)
        if self._tiny is not None:
            self._tiny.to(*args, **kwargs)
        return self

    def stream(
        self,
        prompt: str,
        *,
        source: Any = None,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> Session[LiveImageState, ImageControl]:
        """An endless session; `settings` are the fields of `ImageControl`, and can be steered while it runs.

        `session.step(Frame(picture, time))` redraws a picture [3, H, W] of the pipeline's size; `session.step()` draws
        from words alone. With a `source` (`ms.Camera()`, `ms.VideoFile(...)`) iterating takes the pictures from there,
        cut to size, until it ends; `ms.live(source, session, sink)` does the same with threads, and drops what is late.
        """
        if any(is_offloaded(part) for part in self.pipe.components.values()):
            raise ValueError("a stream cannot run with model CPU offload; move the pipeline with .to(device) instead")
        control = ImageControl(prompt, **settings)
        if source is None:
            return Session(self, control, generator=generator)
        if control.strength is None:  # pictures are certain: refuse what leaves none of their steps
            control = replace(control, strength=USUAL_STRENGTH)
        return SourceSession(self, control, generator=generator, source=source)

    @torch.no_grad()
    def warmup(self, control: ImageControl | None = None, *, pictures: bool = True) -> None:
        """Redraw grey pictures for nobody, under a progress bar, so that no later frame waits.

        Kernels are compiled, and on a GPU the fastest convolutions are found and every step is recorded as a graph.

        Args:
            control: what the stream will be asked for, as far as it decides which kernels run.
            pictures: whether there will be pictures to redraw.
        """
        grey = torch.full((3, *self.size), 0.5)
        control = replace(control or ImageControl(), skip_similar=None, prompt="warm-up")
        steps = len(self.levels(control, drawn_from="picture" if pictures else "words").steps)
        first = self.lanes[0].recordings
        count = len(self.lanes) * (2 * steps + first.patience) if first.records else 1
        with (
            Session(self, control, generator=torch.Generator().manual_seed(0)) as session,
            fastest_convolutions(),
        ):
            for _ in self.pipe.progress_bar(range(count)):
                session.step(Frame(grey, 0.0) if pictures else None)
            session.flush()

    # What a session asks of a pipeline

    def check(self, control: ImageControl) -> None:
        """Refuse steps that the scheduler does not know, and guidance that the network takes by itself."""
        self.levels(control, drawn_from="picture")
        if control.guidance != "none" and self.network.reads_guidance:
            raise ValueError(
                f'this model is told its guidance scale and needs no second pass; take guidance="none" and a '
                f"guidance_scale ({self.network.guidance:g} by default), got {control.guidance!r}"
            )
        self.conditions(control)  # here the thread that steers reads the prompt, and no frame waits for it

    def begin(self, control: ImageControl, *, generator: torch.Generator | None = None) -> LiveImageState:
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else None))
        with self._sharing:
            self.settle()
            return LiveImageState(seed)

    @torch.no_grad()
    def advance(
        self, states: Sequence[LiveImageState], controls: Sequence[ImageControl], media: Sequence[Frame | None]
    ) -> Sequence[Sequence[Chunk]]:
        """One tick: take each stream's picture in, move what is under way, hand out what is finished."""
        for frame, control in zip(media, controls):
            self._check_picture(frame, control)
        with self._sharing:
            lane = self.next_lane()
            chunks: list[list[Chunk]] = [[] for _ in states]
            alone, flying = [], []
            for number, (state, control, frame) in enumerate(zip(states, controls, media)):
                if frame is not None and leaves_out(state, control, frame.data):
                    if state.flying:
                        flying.append(number)
                    else:
                        arrived = self._arrived(state)  # newer than what was shown last
                        chunks[number] += arrived or [self._again(state, control.version, frame.time)]
                    continue
                entering = self._enter(lane, state, control, frame)
                if state.flying and len(state.flying[0].levels.steps) != len(entering.levels.steps):
                    self._move_until_done(lane, [state], chunks, [number])
                state.flying.append(entering)
                (flying if control.stream_batch else alone).append(number)
            self._move_until_done(lane, [states[number] for number in alone], chunks, alone)
            self._tick(lane, [states[number] for number in flying], chunks, flying)
            for state, control, drawn in zip(states, controls, chunks):
                keep_shown(state, control, drawn)
                if not drawn and state.picture is not None:
                    drawn.append(self._again(state, state.shown_version, state.shown_time))
            return chunks

    @torch.no_grad()
    def flush(self, state: LiveImageState) -> Sequence[Chunk]:
        """The pictures that are still under way."""
        with self._sharing:
            chunks: list[list[Chunk]] = [[]]
            self._move_until_done(self.next_lane(), [state], chunks, [0])
            drawn = [*chunks[0], *self._arrived(state)]
            if drawn and state.picture is not None:
                state.picture = drawn[-1].data.clone()
            return drawn

    def save(self, state: LiveImageState) -> Leaves:
        with self._sharing:
            if state.arriving:
                raise ValueError(
                    "a pipeline with overlap=True has pictures on their way that a snapshot would lose; make it without"
                )
            for frame in state.flying:
                if frame.ready is not None:
                    frame.ready.synchronize()
            return to_leaves(state)

    def load(self, leaves: Leaves) -> LiveImageState:
        plain, frames = from_leaves(leaves)
        with self._sharing:
            state = LiveImageState(**plain)
            for values in frames:
                moved = {name: values[name].to(self.device) for name in ("latents", "reference")}
                if any(tuple(part.shape) != self.latent_size for part in moved.values()):
                    raise ValueError(
                        f"the snapshot's latents are not of this pipeline, whose are {list(self.latent_size)}"
                    )
                levels = self.levels(values["control"], drawn_from=values["drawn_from"])
                if not 0 <= values["step"] < len(levels.steps):
                    raise ValueError(
                        f"the snapshot has a frame after {values['step']} steps, which has {len(levels.steps)} here"
                    )
                told = self.conditions(values["control"])
                state.flying.append(LiveFrame(levels=levels, told=told, **{**values, **moved}))
            return state

    def end(self, state: LiveImageState) -> None:
        """Nothing is held for a stream outside its state."""

    # Frames

    def _enter(self, lane: Lane, state: LiveImageState, control: ImageControl, frame: Frame | None) -> LiveFrame:
        drawn_from: DrawnFrom = "words" if frame is None else "picture"
        levels, prompt = self.levels(control, drawn_from=drawn_from), self.prompt_of(control)
        if state.told is None or state.told[0] != prompt:
            state.told = prompt, self.conditions(control)
        number, state.frame = state.frame, state.frame + 1
        picture = None
        if frame is not None:
            look_at(state, control, frame.data)
            picture = lane.own(frame.data)
        with lane.entered():
            if picture is None:
                latents = self.from_noise(state.seed, number, levels)
                clean = torch.zeros_like(latents)
            else:
                latents, clean = self.take_in(lane, lane.upload(picture), state.seed, number, levels)
        when = time.monotonic() if frame is None else frame.time
        told, ready = state.told[1], lane.done()
        return LiveFrame(latents, clean, number, control, levels, when, told, drawn_from, ready=ready)

    def _move_until_done(
        self, lane: Lane, states: Sequence[LiveImageState], chunks: Sequence[list[Chunk]], numbers: Sequence[int]
    ) -> None:
        while any(state.flying for state in states):
            self._tick(lane, states, chunks, numbers)

    def _tick(
        self, lane: Lane, states: Sequence[LiveImageState], chunks: Sequence[list[Chunk]], numbers: Sequence[int]
    ) -> None:
        """Move every frame under way one step on, and put those that are finished into `chunks`."""
        flying = [(state.seed, frame) for state in states for frame in state.flying if not frame.finished]
        rules = dict.fromkeys(frame.levels.rule for _, frame in flying)  # one, unless the scheduler was exchanged
        with lane.entered():
            for rule in rules:
                self.move(lane, [entry for entry in flying if entry[1].levels.rule == rule])
        before = [len(state.arriving) for state in states]
        for state, number in zip(states, numbers):
            while state.flying and state.flying[0].finished:  # several only where a tick has failed before
                frame = state.flying[0]
                version, when = frame.control.version, frame.time
                with lane.entered():
                    lane.receive(frame.ready, frame.latents)
                    picture = self.decode(lane, frame.levels.final * frame.latents[None], bytes_=self.overlap)
                    arriving = Arriving(picture, lane) if self.overlap else None
                state.flying.pop(0)
                if arriving is None:
                    chunks[number].append(self._handed_out(state, picture, version, when))
                else:
                    state.arriving.append((arriving, version, when))
        for state, number, count in zip(states, numbers, before):  # waited for once everything is asked of the device
            chunks[number].extend(self._arrived(state, count))

    def _arrived(self, state: LiveImageState, count: int | None = None) -> list[Chunk]:
        """What was on its way to the host: the first `count`, or all."""
        arriving, state.arriving = state.arriving[:count], [] if count is None else state.arriving[count:]
        return [self._handed_out(state, each.wait(), version, when) for each, version, when in arriving]

    def _handed_out(self, state: LiveImageState, picture: Tensor, version: int, when: float) -> Chunk:
        state.given += 1
        return Chunk("video", picture, state.given - 1, self.rate, version, when)

    def _again(self, state: LiveImageState, version: int, when: float) -> Chunk:
        assert state.picture is not None, "the filter skips nothing before there is a picture to give again"
        return self._handed_out(state, state.picture.clone(), version, when)

    def _check_picture(self, frame: Frame | None, control: ImageControl) -> None:
        if frame is None:
            if control.guidance == "self":
                raise ValueError(
                    'guidance "self" follows the input picture and there is none; give one, or take "full"'
                )
            return
        picture = frame.data
        if not isinstance(picture, Tensor):
            raise TypeError(
                f"a picture is a tensor [3, {self.size[0]}, {self.size[1]}], got a {type(picture).__name__}"
            )
        known = picture.is_floating_point() or picture.dtype == torch.uint8
        if tuple(picture.shape) != (3, *self.size) or not known:
            raise ValueError(
                f"a picture here is [3, {self.size[0]}, {self.size[1]}] in floats from 0 to 1 or uint8, got "
                f"{list(picture.shape)} in {picture.dtype}; millstream.streaming.fit(picture, pipe.size) makes it so"
            )
