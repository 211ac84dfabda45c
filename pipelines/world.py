"""A playable world: each step reads the keys, draws one frame and remembers it.

`WorldPipeline` is stateless apart from its arena of rows; what a stream is lives in the `WorldState` that its session
owns. A step is one pass of the transformer per sampler step, one more pass that writes the finished frame into the KV
cache, and a decode. All noise is a pure function of (seed, frame, step), so however streams are batched, saved or
forked, a frame stays the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
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

from ..kernels import philox_normal
from ..models.frame_codec import FrameAutoencoder
from ..models.text_encoder import ByteTextEncoder
from ..models.transformer import CausalTransformer3DModel
from ..samplers import FlowSampler
from ..samplers.flow_sampler import integrate
from ..samplers.guidance import combine
from ..streaming import Chunk, Frame, Session, WorldControl
from ..streaming.kv_cache import KVCache, KVChunk, Window
from ..streaming.types import Leaves
from .rows import RowArena

ASSETS = Path(__file__).resolve().parent.parent / "assets"
COMMIT_NOISE = 1 << 20  # the noise step of the pass that writes the cache; sampler steps count from 0

Keys = str | Iterable[str] | None


@dataclass
class WorldPipelineOutput(BaseOutput):
    """`frames`: a list of PIL images, or [T, H, W, 3] (`np`), [T, 3, H, W] (`pt`), [C, T, h, w] (`latent`)."""

    frames: Any


@dataclass
class WorldState:
    """One stream: its row of the arena, the seed of its noise, and how far it is."""

    row: int
    seed: int
    frame: int = 0
    prompt: str = ""
    turn: float = 0.0  # mouse movement that no turn has used up yet, pixels
    latents: Tensor | None = None  # of the last frame, [C, h, w]


class WorldPipeline(DiffusionPipeline):
    """Draws a world frame by frame while keys and words steer it.

    Args:
        transformer, codec, text_encoder, scheduler: the parts.
        worlds: one caption per world that was learnt.
        buttons: what each action column presses.
        key_map: W3C key code -> button.
        size: (height, width) of a frame in pixels, (96, 128) by default.
        rate: frames per second of the world's own clock.
        window, sinks: frames that stay in memory, the current one included.
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
            for number in self.progress_bar(range(num_frames)):
                session.steer(keys=script[number] if number < len(script) else frozenset())
                (chunk,) = session.step()
                frames.append(session.state.latents if output_type == "latent" else chunk.data[0])
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
            leaves: Leaves = {f"cache.{name}": value for name, value in self.arena.cache.snapshot(state.row).items()}
        return leaves | {name: value for name, value in asdict(state).items() if name != "row" and value is not None}

    @torch.no_grad()  # with gradients the prompt encoder takes another path, which differs in the last bit
    def load(self, leaves: Leaves) -> WorldState:
        cache = {name.removeprefix("cache."): value for name, value in leaves.items() if name.startswith("cache.")}
        known = {field.name for field in fields(WorldState)} - {"row"}
        plain = {name: value for name, value in leaves.items() if not name.startswith("cache.")}
        if (
            not {"k", "v", "sink_k", "count"} <= set(cache)
            or not {"seed", "frame", "prompt", "turn"} <= set(plain) <= known
        ):
            raise ValueError(f"this is not the snapshot of a world: it holds {', '.join(sorted(leaves)[:8])}")
        kinds = {"seed": int, "frame": int, "prompt": str, "turn": float, "latents": Tensor}
        wrong = [name for name, value in plain.items() if not isinstance(value, kinds[name])]
        if wrong:
            raise ValueError(f"the snapshot is damaged: {wrong[0]} is a {type(plain[wrong[0]]).__name__}")
        if cache["count"] != plain["frame"]:
            raise ValueError(f"the snapshot is damaged: {cache['count']} frames in memory, {plain['frame']} drawn")
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

    # How a frame is made.

    @property
    def arena(self) -> RowArena:
        """Memory of the running streams."""
        if self._arena is None:
            self._arena = RowArena(self._make_cache, self.transformer)
        return self._arena

    def _take_row(self) -> int:
        """A fresh row; the arena follows the weights to another device while nothing runs."""
        model = self.transformer
        if not self.arena.in_use and (self.arena.device, self.arena.dtype) != (model.device, model.dtype):
            self._arena = None
        return self.arena.take()

    def _make_cache(self, rows: int) -> KVCache:
        model, config = self.transformer, self.transformer.config
        return KVCache(
            layers=config["num_layers"],
            rows=rows,
            heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            tokens_per_frame=self.size[0] * self.size[1] // 256,
            window=self.window,
            device=model.device,
            dtype=model.dtype,
        )

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

    def draw(self, states: Sequence[WorldState], chunk: KVChunk, actions: Tensor, control: WorldControl) -> Tensor:
        """Denoise the next frame of every state: latents [B, C, 1, h, w]."""
        text = self.arena.prompts(chunk.rows)
        silence = self._silence(len(states)) if control.guidance_scale != 1 else None

        def denoise(latents: Tensor, sigma: float) -> Tensor:
            flow = self._flow(latents, sigma, text, chunk, actions)
            if silence is None:
                return flow
            return combine(flow, self._flow(latents, sigma, silence, chunk, actions), control.guidance_scale)

        sigmas = self.scheduler.sigmas(control.num_inference_steps)
        return integrate(
            denoise,
            self._noise(states, 0),
            sigmas,
            self.scheduler.rule,
            noise=lambda step: self._noise(states, step + 1),
        )

    def remember(self, states: Sequence[WorldState], latents: Tensor, chunk: KVChunk, actions: Tensor) -> None:
        """Write the finished frame into the cache, a little noised, as in training."""
        sigma = self.scheduler.config["context_sigma"]
        noisy = self.scheduler.add_noise(latents, self._noise(states, COMMIT_NOISE), sigma)
        self._flow(noisy, sigma, self.arena.prompts(chunk.rows), chunk, actions)
        chunk.commit()

    def encode(self, pictures: Sequence[Tensor]) -> Tensor:
        """Pictures [3, H, W] in [0, 1] to latents [B, C, 1, h, w]."""
        together = torch.stack([picture.to(self.arena.device, self.arena.dtype) for picture in pictures])
        return self.codec.encode(together[:, None])

    def _check_picture(self, picture: Tensor) -> None:
        """Called before any stream moves, so that one bad picture costs the others nothing."""
        if tuple(picture.shape) != (3, *self.size) or not picture.is_floating_point():
            raise ValueError(
                f"a frame of this world is [3, {self.size[0]}, {self.size[1]}] in floats from 0 to 1, got "
                f"{list(picture.shape)} in {picture.dtype}"
            )

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, 1, h, w] to frames [B, 1, 3, H, W] in [0, 1], float32."""
        return self.codec.decode(latents.to(self.arena.dtype)).float()

    def _flow(self, latents: Tensor, sigma: float, text: Any, chunk: KVChunk, actions: Tensor) -> Tensor:
        timestep = torch.full((latents.shape[0], 1), self.scheduler.timestep(sigma), device=latents.device)
        (flow,) = self.transformer(
            latents.to(self.arena.dtype),
            timestep,
            actions=actions,
            text_keys=text,
            cache=chunk,
            return_dict=False,
        )
        return flow.float()

    def _noise(self, states: Sequence[WorldState], step: int) -> Tensor:
        shape = (self.codec.config["latent_channels"], 1, self.size[0] // 8, self.size[1] // 8)
        seed, frame = torch.tensor([[state.seed, state.frame] for state in states], device=self.arena.device).unbind(1)
        return philox_normal(seed, frame, step, shape)

    def _read_prompt(self, state: WorldState, prompt: str) -> None:
        self.arena.read_prompt(state.row, self.text_encoder.encode([prompt]).to(self.arena.dtype))
        state.prompt = prompt

    def _silence(self, count: int) -> Any:
        tokens = self.text_encoder.encode([""]).to(self.arena.dtype)
        return self.transformer.embed_text(tokens.expand(count, -1, -1))

    def _action(self, state: WorldState, control: WorldControl) -> list[float]:
        """Which buttons are pressed; mouse movement to the side is paid out in turns."""
        pressed = {self.key_map[key] for key in control.keys}
        state.turn += control.mouse[0]
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
