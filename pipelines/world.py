"""A playable world: each step reads the keys, draws one frame and remembers it.

`WorldPipeline` is stateless apart from its arena of rows; what a stream is lives in the `WorldState` that its session
owns. A step is one pass of the transformer per sampler step, one more pass that writes the finished frame into the KV
cache, and a decode. All noise is a pure function of (seed, frame, step), so however streams are batched, saved or
forked, a frame stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..models.frame_codec import FrameAutoencoder
from ..models.text_encoder import ByteTextEncoder
from ..models.transformer import CausalTransformer3DModel
from ..samplers import FlowSampler
from ..streaming import Session, WorldControl
from ..streaming.kv_cache import Window
from .assets import shipped
from .presets import Preset, apply_preset, find_preset, refuse_saving
from .rows import RowArena
from .world_output import Keys, OutputType, WorldPipelineOutput, as_output, is_offloaded, last_latents, pressed
from .world_state import WorldState
from .world_streams import WorldStreams

FIXED = ("size", "buttons", "preset")  # what the weights were made for, or made into


class WorldPipeline(WorldStreams):
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
        preset: how exactly it draws: a `Preset`, or the name of one. It is applied to the weights that are given.
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
        preset: Preset | str = "exact",
    ) -> None:
        super().__init__()
        astray = sorted(set((key_map or {}).values()) - set(buttons or ()))
        if astray:
            raise ValueError(f"key_map presses {', '.join(astray)}, but the buttons are {', '.join(buttons or ())}")
        self.register_modules(transformer=transformer, codec=codec, text_encoder=text_encoder, scheduler=scheduler)
        self._worlds, self.buttons, self.key_map = tuple(worlds or ()), list(buttons or ()), dict(key_map or {})
        self.rate, self.window, self.pixels_per_turn = rate, Window(window, sinks), pixels_per_turn
        height, width = size or (96, 128)
        self.size = (height, width)
        self.register_to_config(
            worlds=list(self.worlds),
            buttons=self.buttons,
            key_map=self.key_map,
            size=[height, width],
            rate=rate,
            window=window,
            sinks=sinks,
            pixels_per_turn=pixels_per_turn,
        )
        self.preset = find_preset(preset)
        apply_preset(self.preset, transformer)
        self._arena: RowArena | None = None
        self._sharing = RLock()  # sessions may run on threads of their own, and one that opens may move the arena
        self._captions: Tensor | None = None

    @property
    def worlds(self) -> tuple[str, ...]:
        """One caption per world that was learnt; setting them changes what `nearest_world` compares with."""
        return self._worlds

    @worlds.setter
    def worlds(self, captions: Sequence[str]) -> None:
        if isinstance(captions, str) or not all(isinstance(caption, str) and caption.strip() for caption in captions):
            raise ValueError(f'worlds must be captions such as ["a brick corridor with soldiers"], got {captions!r}')
        self._worlds, self._captions = tuple(captions), None
        self.register_to_config(worlds=list(captions))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and name in self.__dict__:
            raise AttributeError(
                f"{name} is what the weights of this pipeline were made for and stays as it is; make another pipeline "
                f"with WorldPipeline(**pipe.components, {name}=...)"
            )
        super().__setattr__(name, value)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the weights as diffusers does. ValueError while sessions are open: their memory would stay behind."""
        open_sessions = self._arena.in_use if self._arena is not None else 0
        wanted = [*args, kwargs.get("device"), kwargs.get("dtype")]
        if open_sessions and any(self._is_elsewhere(place) for place in wanted if place is not None):
            raise ValueError(
                f"{open_sessions} open session(s) of this pipeline live on {self.arena.device} in {self.arena.dtype}; "
                "close them (session.close()) before it moves, or load another pipeline there"
            )
        return super().to(*args, **kwargs)

    def _is_elsewhere(self, place: str | int | torch.device | torch.dtype) -> bool:
        if isinstance(place, torch.dtype):
            return place != self.arena.dtype
        device, here = torch.device(place), self.arena.device
        return device.type != here.type or (None not in (device.index, here.index) and device.index != here.index)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a shipped model by name ("freedoom"), a folder, or a repository; see diffusers for the arguments."""
        name = shipped(pretrained_model_name_or_path) or pretrained_model_name_or_path
        return super().from_pretrained(str(name), **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers does. ValueError if a preset has changed the weights."""
        refuse_saving(self.preset, self.transformer)
        super().save_pretrained(*args, **kwargs)

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
        output_type: OutputType = "pil",
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
        script = [pressed(held) for held in keys or ()]
        settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        for held in set(script):
            self.check(WorldControl(prompt, keys=held))
        frames: list[Tensor] = []
        with self.stream(prompt, generator=generator, **settings) as session:
            progress_bar: Any = self.progress_bar  # accelerate's wrapper hides its signature from type checkers
            for number in progress_bar(range(num_frames)):
                session.steer(keys=script[number] if number < len(script) else frozenset())
                (chunk,) = session.step()
                frames.append(last_latents(session.state) if output_type == "latent" else chunk.data[0])
                if callback_on_step_end is not None:
                    callback_on_step_end(self, number, 0, {"frame": chunk.data[0]})
        clip = as_output(frames, output_type)
        return WorldPipelineOutput(frames=clip) if return_dict else (clip,)

    def stream(
        self,
        prompt: str,
        *,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        strength: float | None = None,
        stream_batch: bool = False,
        skip_similar: float | None = None,
        follow_motion: float = 0.0,
    ) -> Session[WorldState, WorldControl]:
        """An endless session; all of it but `generator` can be steered while it runs (see `WorldControl`).

        `session.step(Frame(picture, time))` with a picture [3, H, W] of the pipeline's size shows the world a true
        frame and draws none; with a `strength` above 0 it redraws the picture as this world.
        """
        if any(is_offloaded(part) for part in self.components.values()):
            raise ValueError("a stream cannot run with model CPU offload; move the pipeline with .to(device) instead")
        control = WorldControl(
            prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            strength=strength,
            stream_batch=stream_batch,
            skip_similar=skip_similar,
            follow_motion=follow_motion,
        )
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
