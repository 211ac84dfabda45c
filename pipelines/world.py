"""A playable world: each step reads the keys, draws one frame and remembers it.

`WorldPipeline` is stateless apart from its arena of rows; what a stream is lives in the `WorldState` that its session
owns. A step is one pass of the transformer per sampler step, one more pass that writes the finished frame into the KV
cache, and a decode. All noise is a pure function of (seed, frame, step), so however streams are batched, saved or
forked, a frame stays the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from threading import RLock
from typing import Any, Literal

import numpy as np
import torch
from accelerate.hooks import CpuOffload
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from typing_extensions import Self

from ..models.frame_codec import FrameAutoencoder
from ..models.text_encoder import ByteTextEncoder
from ..models.transformer import CausalTransformer3DModel
from ..samplers import FlowSampler
from ..streaming import Chunk, Frame, Session, WorldControl
from ..streaming.kv_cache import Window
from ..streaming.types import Leaves
from .rows import RowArena
from .world_frames import FrameDrawer
from .world_state import WorldState, from_leaves, to_leaves

ASSETS = Path(__file__).resolve().parent.parent / "assets"

MOST_TURNS_OWED = 9  # half a second: a flick of the mouse must not go on turning for longer

Keys = str | Iterable[str] | None


@dataclass
class WorldPipelineOutput(BaseOutput):
    """`frames`: a list of PIL images, or [T, H, W, 3] (`np`), [T, 3, H, W] (`pt`), [C, T, h, w] (`latent`)."""

    frames: Any


class WorldPipeline(FrameDrawer):
    """Draws a world frame by frame while keys and words steer it.

    Args:
        transformer, codec, text_encoder, scheduler: the parts.
        worlds: one caption per world that was learnt.
        buttons: what each action column presses.
        key_map: W3C key code -> button.
        size: (height, width) of a frame in pixels, (96, 128) by default.
        rate: frames per second of the world's own clock.
        window, sinks: frames that stay in memory, the current one included.
        pixels_per_turn: mouse movement to the side that one frame of turning uses up.
    """

    model_cpu_offload_seq = "text_encoder->transformer->codec"

    def __init__(
        self,
        transformer: CausalTransformer3DModel,
        codec: FrameAutoencoder,
        text_encoder: ByteTextEncoder,
        scheduler: FlowSampler,
        worlds: list[str] | None = None,
        buttons: list[str] | None = None,
        key_map: dict[str, str] | None = None,
        size: list[int] | None = None,
        rate: float = 17.5,
        window: int = 24,
        sinks: int = 0,
        pixels_per_turn: float = 12.0,
    ) -> None:
        super().__init__()
        astray = sorted(set((key_map or {}).values()) - set(buttons or ()))
        if astray:
            raise ValueError(f"key_map presses {', '.join(astray)}, but the buttons are {', '.join(buttons or ())}")
        self.register_modules(transformer=transformer, codec=codec, text_encoder=text_encoder, scheduler=scheduler)
        self.worlds, self.buttons, self.key_map = list(worlds or ()), list(buttons or ()), dict(key_map or {})
        self.rate, self.window, self.pixels_per_turn = rate, Window(window, sinks), pixels_per_turn
        height, width = size or (96, 128)
        self.size = (height, width)
        self.register_to_config(
            worlds=self.worlds,
            buttons=self.buttons,
            key_map=self.key_map,
            size=[height, width],
            rate=rate,
            window=window,
            sinks=sinks,
            pixels_per_turn=pixels_per_turn,
        )
        self._arena: RowArena | None = None
        self._sharing = RLock()  # sessions may run on threads of their own, and one that opens may move the arena
        self._captions: Tensor | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a shipped model by name ("freedoom"), a folder, or a repository; see diffusers for the arguments."""
        packaged = ASSETS / str(pretrained_model_name_or_path)
        name = packaged if (packaged / "model_index.json").is_file() else pretrained_model_name_or_path
        return super().from_pretrained(str(name), **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        *,
        num_frames: int = 120,
        keys: Sequence[Keys] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None] | None = None,
    ) -> WorldPipelineOutput | tuple[Any]:
        """Draw a clip: the stream, drained.

        Args:
            prompt: the world in words.
            num_frames: length, at least 1; `rate` of them make a second.
            keys: what is held at each frame: a key code ("KeyW"), several, or None; none at all where the list ends.
            num_inference_steps, guidance_scale: see `WorldControl`.
            generator: the same generator state and keys give the same frames.
            callback_on_step_end: called after every frame as (pipeline, frame number, 0, {"frame": [3, H, W]}).

        Raises:
            ValueError, TypeError: an argument out of range, an unknown key or output type.
        """
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        if isinstance(keys, str):
            raise TypeError(f"keys must hold one entry per frame, such as [{keys!r}] * num_frames, got {keys!r}")
        script = [_pressed(held) for held in keys or ()]
        settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        for held in set(script):
            self.check(WorldControl(prompt, keys=held))
        frames: list[Tensor] = []
        with self.stream(prompt, generator=generator, **settings) as session:
            progress_bar: Any = self.progress_bar  # accelerate's wrapper hides its signature from type checkers
            for number in progress_bar(range(num_frames)):
                session.steer(keys=script[number] if number < len(script) else frozenset())
                (chunk,) = session.step()
                frames.append(_latents(session.state) if output_type == "latent" else chunk.data[0])
                if callback_on_step_end is not None:
                    callback_on_step_end(self, number, 0, {"frame": chunk.data[0]})
        clip = _as_output(frames, output_type)
        return WorldPipelineOutput(frames=clip) if return_dict else (clip,)

    def stream(
        self,
        prompt: str,
        *,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
    ) -> Session[WorldState, WorldControl]:
        """An endless session. `session.step(Frame(picture, time))` shows the world a true frame and draws none."""
        if any(_is_offloaded(part) for part in self.components.values()):
            raise ValueError("a stream cannot run with model CPU offload; move the pipeline with .to(device) instead")
        control = WorldControl(prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        return Session(self, control, generator=generator)

    @torch.no_grad()
    def nearest_world(self, prompt: str) -> tuple[str, float]:
        """The learnt world whose caption is nearest in meaning, and how near (cosine, up to 1)."""
        summary = self.text_encoder.summary
        if self._captions is None:
            self._captions = summary(self.text_encoder.encode(self.worlds))
        similarity = self._captions.to(self.device) @ summary(self.text_encoder.encode([prompt]))[0]
        best = int(similarity.argmax())
        return self.worlds[best], float(similarity[best])

    # What a session asks for (`Streamable`).

    def check(self, control: WorldControl) -> None:
        """Refuse keys that press nothing here, an empty prompt and a number of steps the sampler does not know."""
        if not control.prompt.strip():
            example = self.worlds[0] if self.worlds else "a brick corridor with soldiers"
            raise ValueError(f'the prompt is empty; describe a world, for example "{example}"')
        if any("\ud800" <= character <= "\udfff" for character in control.prompt):
            raise ValueError("the prompt holds half a character (a lone surrogate); send it as UTF-8")
        unknown = sorted(control.keys - self.key_map.keys())
        if unknown:
            raise ValueError(f"unknown key {', '.join(unknown)}; the keys of this world are {', '.join(self.key_map)}")
        self.scheduler.sigmas(control.num_inference_steps)

    def begin(self, control: WorldControl, *, generator: torch.Generator | None = None) -> WorldState:
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else None))
        with self._sharing:
            return WorldState(self._take_row(), seed)

    @torch.no_grad()
    def advance(
        self, states: Sequence[WorldState], controls: Sequence[WorldControl], media: Sequence[Frame | None]
    ) -> Sequence[Sequence[Chunk]]:
        """One frame for every state; states with the same settings go through the network together."""
        for frame in media:
            if frame is not None:
                self._check_picture(frame.data)
        chunks: dict[int, Chunk] = {}
        jobs = sorted(zip(states, controls, media), key=lambda job: (_kind(job), job[0].row))
        for _, group in groupby(jobs, key=_kind):
            together = list(group)
            with self._sharing:
                pictures = self._advance_group(*zip(*together))
            for (state, control, frame), picture in zip(together, pictures):
                when = time.monotonic() if frame is None else frame.time
                chunks[state.row] = Chunk("video", picture, state.frame - 1, self.rate, control.version, when)
        return [[chunks[state.row]] for state in states]

    def flush(self, state: WorldState) -> Sequence[Chunk]:
        return ()

    def save(self, state: WorldState) -> Leaves:
        with self._sharing:
            return to_leaves(state, self.arena.cache.snapshot(state.row))

    @torch.no_grad()  # with gradients the prompt encoder takes another path, which differs in the last bit
    def load(self, leaves: Leaves) -> WorldState:
        cache, plain = from_leaves(leaves)
        with self._sharing:
            row = self._take_row()
            try:
                self.arena.cache.restore(row, cache)
                state = WorldState(row=row, **plain)
                self._read_prompt(state, state.prompt)
            except BaseException:
                self.arena.give_back(row)
                raise
            return state

    def end(self, state: WorldState) -> None:
        row, state.row = state.row, -1
        if row >= 0:
            self.arena.give_back(row)

    def _advance_group(
        self, states: Sequence[WorldState], controls: Sequence[WorldControl], media: Sequence[Frame | None]
    ) -> Iterator[Tensor]:
        """Frames [1, 3, H, W] of states that share their settings."""
        for state, control in zip(states, controls):
            if state.prompt != control.prompt:
                self._read_prompt(state, control.prompt)
        chunk = self.arena.cache.open([state.row for state in states])
        actions = torch.tensor(
            [self._action(state, control) for state, control in zip(states, controls)],
            device=self.arena.device,
            dtype=self.arena.dtype,
        )[:, None]
        if media[0] is None:
            latents = self.draw(states, chunk, actions, controls[0])
        else:
            latents = self.encode([frame.data for frame in media if frame is not None])
        self.remember(states, latents, chunk, actions)
        for state, latent in zip(states, latents):
            state.latents = latent[:, 0]
            state.frame += 1
        return iter(self.decode(latents))

    def _check_picture(self, picture: Tensor) -> None:
        """Called before any stream moves, so that one bad picture costs the others nothing."""
        if tuple(picture.shape) != (3, *self.size) or not picture.is_floating_point():
            raise ValueError(
                f"a frame of this world is [3, {self.size[0]}, {self.size[1]}] in floats from 0 to 1, got "
                f"{list(picture.shape)} in {picture.dtype}"
            )

    def _action(self, state: WorldState, control: WorldControl) -> list[float]:
        """Which buttons are pressed; mouse movement to the side is paid out in turns."""
        pressed = {self.key_map[key] for key in control.keys}
        limit = MOST_TURNS_OWED * self.pixels_per_turn
        state.turn = max(-limit, min(limit, state.turn + control.mouse[0]))
        if abs(state.turn) >= self.pixels_per_turn:
            pressed.add("TURN_RIGHT" if state.turn > 0 else "TURN_LEFT")
            state.turn -= self.pixels_per_turn * (1 if state.turn > 0 else -1)
        return [float(button in pressed) for button in self.buttons]


def _kind(job: tuple[WorldState, WorldControl, Frame | None]) -> tuple[bool, int, float]:
    """What must agree for states to share their passes."""
    _, control, frame = job
    return frame is not None, control.num_inference_steps or 0, float(control.guidance_scale)


def _pressed(held: Keys) -> frozenset[str]:
    if held is None:
        return frozenset()
    return frozenset([held] if isinstance(held, str) else held)


def _latents(state: WorldState | None) -> Tensor:
    assert state is not None, "a session that has stepped has a state"
    assert state.latents is not None, "and that state a frame"
    return state.latents


def _as_output(frames: Sequence[Tensor], output_type: str) -> Any:
    if output_type == "latent":
        return torch.stack(list(frames), dim=1)
    clip = torch.stack(list(frames))
    if output_type == "pt":
        return clip
    pictures = clip.permute(0, 2, 3, 1).cpu().numpy()
    return pictures if output_type == "np" else DiffusionPipeline.numpy_to_pil(np.asarray(pictures))


def _is_offloaded(part: Any) -> bool:
    """Does accelerate move this part between devices at every call?"""
    hooks = [getattr(module, "_hf_hook", None) for module in part.modules()] if isinstance(part, nn.Module) else []
    return any(isinstance(hook, CpuOffload) or getattr(hook, "offload", False) for hook in hooks)
