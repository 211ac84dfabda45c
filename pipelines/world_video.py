"""How a world redraws a picture: noise it part of the way, denoise it with the stream's memory.

A strength s from 0 to 1 says how far. Of the sampler's steps the last ones remain, the fewest that reach up to s (as in
diffusers' img2img), and they are shrunk to begin at s exactly: so a slider moves smoothly however few steps there are,
and at s = 1 what is left is the sampler's own schedule from pure noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..models.transformer import TextKeys
from ..samplers import FlowSampler
from ..samplers.guidance import combine
from ..samplers.schedules import warp
from ..streaming import WorldControl
from ..streaming.kv_cache import KVChunk
from .world_frames import FrameDrawer
from .world_state import WorldState

ROUNDING = 1e-6


def remaining(sampler: FlowSampler, num_inference_steps: int | None, strength: float, within: float) -> list[float]:
    """The levels from `strength` down to 0.

    Args:
        strength: where to begin, above 0 and at most `within`.
        within: the strength that decides how many steps remain, so that `strength` may vary below it without changing
            their number.
    """
    sigmas, shift = sampler.sigmas(num_inference_steps), sampler.schedule.config["shift"]
    times = [warp(sigma, 1 / shift) for sigma in sigmas]  # strength is counted before the schedule's shift
    first = max(index for index, time in enumerate(times) if time >= within - ROUNDING or index == 0)
    scale = min(1.0, strength / times[first])
    return [warp(scale * time, shift) for time in times[first:]]


class PictureDrawer(FrameDrawer):
    """The part of a world pipeline that turns pictures into the world."""

    def levels(self, control: WorldControl, strength: float) -> list[float]:
        """`remaining` under `control`, whose own strength decides how many steps there are."""
        return remaining(self.scheduler, control.num_inference_steps, strength, control.strength or strength)

    def redraw(
        self,
        states: Sequence[WorldState],
        chunk: KVChunk,
        actions: Tensor,
        guidance_scale: float,
        pictures: Sequence[Tensor],
        levels: Sequence[Sequence[float]],
    ) -> Tensor:
        """As `draw`, from pictures: each at levels of its own, as many for all. Latents [B, C, 1, h, w]."""
        rule, last = self.scheduler.rule, len(levels[0]) - 2
        silence = self._silence(len(states)) if guidance_scale != 1 else None

        def redrawn(
            chunk: KVChunk, numbers: Tensor, clean: Tensor, actions: Tensor, levels: Tensor, weight: Tensor
        ) -> Tensor:
            text, columns = self.arena.prompts(chunk.rows), levels.unbind()
            x, memory = self.scheduler.add_noise(clean, self._noise_of(numbers, 0), columns[0]), None
            for step, (sigma, sigma_next) in enumerate(pairwise(columns)):
                fresh = self._noise_of(numbers, step + 1) if rule.needs_noise and step < last else None
                target = sigma_next if step < last else 0.0
                for at in (sigma, sigma_next)[: rule.evaluations_per_step if step < last else 1]:
                    flow = self.guided_flow(x, at, text, silence, chunk, actions, weight)
                    x, memory = rule.step(x, flow, sigma, target, noise=fresh, memory=memory)
            return x

        numbers = torch.tensor([[state.seed for state in states], [state.frame for state in states]])
        inputs = [numbers, self.encode(pictures).float(), actions, columns(levels), columns([[guidance_scale]])[0]]
        return self._run(("redraw", last, rule, silence is not None), redrawn, chunk, inputs)

    def guided_flow(
        self,
        latents: Tensor,
        sigma: Tensor,
        text: TextKeys,
        silence: TextKeys | None,
        chunk: KVChunk,
        actions: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """Flow at levels `sigma`, guided by `weight` (both [B, 1, 1, 1, 1]) if there is a `silence`."""
        if silence is None:
            return self._flow_at(latents, sigma, text, chunk, actions)
        # The prompt's pass comes last: its keys are those that a commit would keep.
        negative = self._flow_at(latents, sigma, silence, chunk, actions)
        return combine(self._flow_at(latents, sigma, text, chunk, actions), negative, weight)

    def _flow_at(self, latents: Tensor, sigma: Tensor, text: TextKeys, chunk: KVChunk, actions: Tensor) -> Tensor:
        (flow,) = self.transformer(
            latents.to(self.arena.dtype),
            self.scheduler.timestep(sigma.flatten(1)),
            actions=actions,
            text_keys=text,
            cache=chunk,
            return_dict=False,
        )
        return flow.float()


def columns(rows: Sequence[Sequence[float]]) -> Tensor:
    """Numbers of B rows as columns that broadcast against latents: [B][n] to [n, B, 1, 1, 1, 1]."""
    return torch.tensor(rows, dtype=torch.float32).T[..., None, None, None, None].contiguous()
