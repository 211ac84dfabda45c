"""How live images are drawn: encode and noise a picture, move frames one step on, decode. Knows nothing of streams.

Latents are [B, C, h, w] in the convention of `live_levels`, in float32; the network and the autoencoder work in their
own precision.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from threading import RLock
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels import philox_normal
from ..samplers.flow import add_noise
from ..samplers.guidance import Residual, combine
from ..streaming import ImageControl
from .live_lanes import Lane
from .live_levels import Levels, read_levels
from .live_networks import Told, check_codec, network_of
from .live_state import DrawnFrom, LiveFrame

USUAL_STRENGTH = 0.5
PROMPTS_KEPT = 16
LEVELS_KEPT = 64
Prompt = tuple[str, str | None, float]
COMPILED = ("default", "max-autotune-no-cudagraphs")  # the other modes record graphs of their own
Follow = Literal["plainly", "residual", "pair", "initialize"]
ASKED_TWICE = ("pair", "initialize")


class ImageDrawer:
    """The part of a live image pipeline that runs the networks.

    Args:
        pipe: diffusers' pipeline, whose parts are used.
        size: (height, width) in pixels.
        steps: of a frame, unless its control says otherwise.
        tiny: an autoencoder in the place of the pipeline's.
        lanes: ticks that may be under way at the same time.
    """

    def __init__(self, pipe: Any, size: tuple[int, int], steps: int, *, tiny: Any = None, lanes: int = 1) -> None:
        self.pipe, self.size, self.steps, self._tiny = pipe, size, steps, tiny
        self.network = network_of(pipe, size)
        check_codec(self.network, self.vae)
        self._codec_dtype: torch.dtype = self.vae.dtype
        self._count, self._lanes, self._turn = lanes, list[Lane](), 0
        self._levels: dict[tuple[int, float], Levels] = {}  # reading a scheduler takes as long as half a frame
        self._levels_of: Any = None
        self._reading = RLock()  # prompts are read by whoever steers, one at a time
        self._knowing = RLock()  # held for moments only
        self._read: OrderedDict[Prompt, Told] = OrderedDict()
        self._read_by: list[int] = []

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        return self.pipe.vae if self._tiny is None else self._tiny

    @property
    def lanes(self) -> Sequence[Lane]:
        """Where ticks run, by turns; made anew when the weights have moved to another device."""
        if not self._lanes or self._lanes[0].recordings.device != self.device:
            self._lanes = [Lane(self.device, own_stream=self._count > 1) for _ in range(self._count)]
        return self._lanes

    def next_lane(self) -> Lane:
        self._turn += 1
        return self.lanes[self._turn % self._count]

    def settle(self) -> None:
        """Notice parts whose weights were exchanged; called when a stream begins."""
        self.network.settle()
        self._codec_dtype = self.vae.dtype
        weights = [*self.network.module.parameters(), *self.vae.parameters()]
        for lane in self.lanes:
            lane.recordings.follow(weights)
        readers = [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]
        read_by = [weight.data_ptr() for part in readers for weight in part.parameters()]
        with self._knowing:
            if read_by != self._read_by:
                self._read.clear()
            self._read_by = read_by

    def prepare(self, *, compiled: bool | str) -> None:
        """Lay the weights out for a GPU, and let torch.compile have them if wanted."""
        vae, module = self.vae, self.network.module
        if self.device.type == "cuda":
            for part in (vae, *([module] if self.network.part == "unet" else [])):
                part.to(memory_format=torch.channels_last)
        mode = "default" if compiled is True else compiled
        if mode and mode not in COMPILED:
            raise ValueError(f"compile must be True, False or one of {', '.join(COMPILED)}, got {compiled!r}")
        if mode:
            self.network.join_projections()
            for name in ("_encode", "_flows", "_paint"):  # what comes before and after a network is joined to it
                setattr(self, name, torch.compile(getattr(self, name), mode=mode, dynamic=False))

    def levels(self, control: ImageControl, *, drawn_from: DrawnFrom) -> Levels:
        """The steps that a frame takes."""
        scheduler, steps, network = self.pipe.scheduler, control.num_inference_steps or self.steps, self.network
        strength = max(USUAL_STRENGTH, 1 / steps) if control.strength is None else control.strength
        strength = strength if drawn_from == "picture" else 1.0
        with self._knowing:
            if self._levels_of is not scheduler or len(self._levels) >= LEVELS_KEPT:
                self._levels_of, self._levels = scheduler, {}
            if (steps, strength) not in self._levels:
                self._levels[steps, strength] = read_levels(
                    scheduler, steps, strength, tokens=network.tokens, rounds_up=network.rounds_up
                )
            return self._levels[steps, strength]

    def scale_of(self, control: ImageControl) -> float:
        return self.network.guidance if control.guidance_scale is None else control.guidance_scale

    def prompt_of(self, control: ImageControl) -> Prompt:
        """What a condition depends on: the words, those to lead away from, what the network is told of guidance."""
        negative = control.negative_prompt if control.guidance in ("initialize", "full") else None
        return control.prompt, negative, self.scale_of(control) if self.network.reads_guidance else 0.0

    @torch.no_grad()
    def conditions(self, control: ImageControl) -> Told:
        """What the network is told for a control: positive and, if it takes passes, negative. Kept by prompt."""
        prompt = self.prompt_of(control)
        with self._knowing:
            if prompt in self._read:
                self._read.move_to_end(prompt)
                return self._read[prompt]
        with self._reading:
            told = self._read.get(prompt) or self.network.read(*prompt)
        with self._knowing:
            self._read[prompt] = told
            if len(self._read) > PROMPTS_KEPT:
                self._read.popitem(last=False)
        return told

    def take_in(self, lane: Lane, picture: Tensor, seed: int, number: int, levels: Levels) -> tuple[Tensor, Tensor]:
        """A picture [3, H, W], floats in [0, 1] or uint8: (noised latents, clean latents), each [C, h, w]."""

        def taken(picture: Tensor, numbers: Tensor, sigma: Tensor) -> Tensor:
            clean = self._encode(picture[None])
            noise = philox_normal(numbers[0], numbers[1], 0, tuple(clean.shape[1:]))
            return torch.cat([add_noise(clean, noise, sigma), clean])

        numbers, sigma = torch.tensor([[seed], [number]]), torch.full((1, 1, 1, 1), levels.steps[0].sigma)
        noisy, clean = _run(lane, ("take in",), taken, [picture, numbers, sigma])
        return noisy, clean

    def from_noise(self, seed: int, number: int, levels: Levels) -> Tensor:
        """Where a frame begins that answers to no picture: [C, h, w]."""
        place = self.device
        noise = philox_normal(
            torch.tensor([seed], device=place), torch.tensor([number], device=place), 0, self.latent_size
        )
        return levels.pure * noise[0]

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """[C, h, w]."""
        pixels = self.pipe.vae_scale_factor
        return self.vae.config.latent_channels, self.size[0] // pixels, self.size[1] // pixels

    def move(self, lane: Lane, frames: Sequence[tuple[int, LiveFrame]]) -> None:
        """One step of every frame, given with its stream's seed, in one pass; all have one rule."""
        told = [frame.told for _, frame in frames]
        for _, frame in frames:
            lane.receive(frame.ready, frame.latents, frame.reference)
        follow: tuple[Follow, ...] = tuple(self._follow(frame) for _, frame in frames)
        rows = [positive for positive, _ in told]
        rows += [negative for (_, negative), how in zip(told, follow) if how in ASKED_TWICE and negative is not None]
        steps, rule = tuple(frame.step for _, frame in frames), frames[0][1].levels.rule

        def moved(numbers: Tensor, x: Tensor, reference: Tensor, columns: Tensor, *conditions: Tensor) -> Tensor:
            sigma, sigma_next, *asking, weight, delta = columns[..., None, None, None].unbind()
            flow, second = self._flows(x, asking, follow, conditions)
            if any(how != "plainly" for how in follow):
                other, reference = _others(x, flow, second, reference, sigma, delta, follow)
                flow = combine(flow, other, weight)
            noise = _noise(numbers, steps, tuple(x.shape[1:])) if rule.needs_noise else None
            x, _ = rule.step(x, flow, sigma, sigma_next, noise=noise)
            return torch.stack([x, reference])

        numbers = torch.tensor([[seed for seed, _ in frames], [frame.number for _, frame in frames]])
        together = [torch.stack([getattr(frame, name) for _, frame in frames]) for name in ("latents", "reference")]
        columns = torch.tensor([self._column(frame) for _, frame in frames]).T.contiguous()
        for row in rows:
            lane.receive(None, *row)
        conditions = [torch.cat(parts) for parts in zip(*rows, strict=True)]
        drawn = _run(lane, ("move", rule, follow, steps), moved, [numbers, *together, columns, *conditions])
        ready = lane.done()
        for (_, frame), latents, reference in zip(frames, *drawn):
            frame.ready = ready
            frame.latents, frame.reference, frame.step = latents, reference, frame.step + 1

    def _flows(
        self, x: Tensor, asking: Sequence[Tensor], follow: Sequence[Follow], conditions: Sequence[Tensor]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The velocity of each row of x, and the negative one of those rows that are asked twice: one call."""
        scale, timestep, keep, take = asking
        twice = [row for row, how in enumerate(follow) if how in ASKED_TWICE]
        inputs, times = scale * x, timestep.flatten()
        if twice:
            inputs = torch.cat([inputs, *(inputs[row : row + 1] for row in twice)])
            times = torch.cat([times, *(times[row : row + 1] for row in twice)])
        out = self.network(inputs.to(self.network.dtype), times, conditions).float()
        second = {row: keep[row] * x[row] + take[row] * out[len(x) + index] for index, row in enumerate(twice)}
        return keep * x + take * out[: len(x)], second

    def _follow(self, frame: LiveFrame) -> Follow:
        how = frame.control.guidance
        if how == "none" or self.network.reads_guidance:
            return "plainly"
        if how == "full":
            return "pair"
        return "initialize" if how == "initialize" and frame.step == 0 else "residual"

    def _column(self, frame: LiveFrame) -> list[float]:
        level = frame.levels.steps[frame.step]
        asking = [level.scale, level.timestep, level.keep, level.take]
        return [level.sigma, level.sigma_next, *asking, self.scale_of(frame.control), frame.control.delta]

    def decode(self, lane: Lane, latents: Tensor, *, bytes_: bool = False) -> Tensor:
        """Latents [B, C, h, w] as pictures [B, 3, H, W] in [0, 1], or in uint8."""

        def decoded(latents: Tensor) -> Tensor:
            return self._paint(latents, bytes_)

        return _run(lane, ("decode", bytes_), decoded, [latents])

    def _paint(self, latents: Tensor, bytes_: bool) -> Tensor:
        config = self.vae.config
        raw = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        (picture,) = self.vae.decode(raw.to(self._codec_dtype), return_dict=False)
        picture = (picture.float() / 2 + 0.5).clamp(0, 1)
        return (picture * 255 + 0.5).to(torch.uint8) if bytes_ else picture.contiguous()

    def _encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] to scaled latents, the middle of their distribution where there is one."""
        vae = self.vae
        pictures = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float()
        encoded = vae.encode((2 * pictures - 1).to(self._codec_dtype))
        if hasattr(encoded, "latent_dist"):
            latents = encoded.latent_dist.mode()
        else:
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        return (latents.float() - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def _run(lane: Lane, kind: tuple[Any, ...], step: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    done = lane.recordings.run(kind, step, inputs)
    assert done is not None, "these steps give tensors"
    return done


def _others(
    x: Tensor,
    flow: Tensor,
    second: Mapping[int, Tensor],
    reference: Tensor,
    sigma: Tensor,
    delta: Tensor,
    follow: Sequence[Follow],
) -> tuple[Tensor, Tensor]:
    """What each row is led away from: its negative velocity, the residual one, or (nowhere) its own.

    With it the references from here on: a row that asked twice at its first step later takes the clean input that its
    second answer points at.
    """
    if "initialize" in follow:
        found = {row: x[row] - sigma[row] * second[row] for row, how in enumerate(follow) if how == "initialize"}
        reference = torch.stack([found.get(row, reference[row]) for row in range(len(follow))])
    residual = Residual().pair(lambda *_: flow, x, sigma, x, reference)[1]
    # StreamDiffusion's delta weighs the virtual noise, residual + reference; that as a velocity. No division by 0 at
    # pure noise, where a virtual noise is x itself and says nothing of the input.
    residual = residual + (delta - 1) * (residual + reference) / (1 - sigma).clamp_min(0.01)
    others = [
        second[row] if how == "pair" else flow[row] if how == "plainly" else residual[row]
        for row, how in enumerate(follow)
    ]
    return torch.stack(others), reference


def _noise(numbers: Tensor, steps: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """The draw of each row [B, *shape]; `numbers` [2, B] are its stream's seed and its own."""
    rows = [
        philox_normal(numbers[0, row : row + 1], numbers[1, row : row + 1], step + 1, shape)
        for row, step in enumerate(steps)
    ]
    return torch.cat(rows)
