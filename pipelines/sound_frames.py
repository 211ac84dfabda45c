"""Streams of residual codes: a pass of the large model, and as many frames as its chained heads add to the first.

Shapes: R rows, Q levels, m frames per pass, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import philox_uniform
from ..models.frame_tokens import FrameTokenTransformer
from ..models.token_layers import Where
from ..samplers import Categorical
from ..streaming.kv_cache import KVCache


@dataclass(eq=False)
class FrameState:
    """Where streams stand that began together.

    Attributes:
        cache: keys and values of the large model and of the chained heads.
        seeds: int64 [R].
        codes: int64 [R, Q, m], the frames of the last pass, which the next one reads.
        told: [R, m, D], what the conditioning tokens told those frames.
        frames: how many are drawn.
    """

    cache: KVCache
    seeds: Tensor
    codes: Tensor
    told: Tensor
    frames: int = 0


class FrameStream:
    """Draws frames of codes with a `FrameTokenTransformer`.

    Args:
        model: the transformer.
        frames_per_pass: m; 1 asks the large model for every frame.
        head: temperature and truncation of the codes.

    Raises:
        ValueError: more frames per pass than the model has heads for.
    """

    def __init__(self, model: FrameTokenTransformer, frames_per_pass: int = 1, head: Categorical | None = None) -> None:
        most = 1 + model.config["chained"]
        if not 1 <= frames_per_pass <= most:
            raise ValueError(
                f"frames_per_pass must be from 1 to {most} (the model's own frame and its {most - 1} chained heads), "
                f"got {frames_per_pass}"
            )
        self.model, self.count, self.head = model, frames_per_pass, head or Categorical()

    def begin(self, seeds: Tensor) -> FrameState:
        """Streams that have not begun, one for each of `seeds` int64 [R]."""
        rows, config = len(seeds), self.model.config
        codes = torch.zeros(rows, config["levels"], self.count, dtype=torch.int64, device=seeds.device)
        told = self.model.first.new_zeros(rows, self.count, config["dim"])
        return FrameState(self.model.make_cache(rows, self.count), seeds, codes, told)

    def save(self, state: FrameState, row: int = 0) -> dict[str, Tensor]:
        """Where a stream stands, as tensors for safetensors. Saved after a prompt, it is a voice."""
        cache = {f"cache.{name}": torch.as_tensor(value) for name, value in state.cache.snapshot(row).items()}
        own = {"codes": state.codes[row].clone(), "told": state.told[row].clone(), "frames": torch.tensor(state.frames)}
        return own | cache

    def resume(self, saved: Mapping[str, Tensor], seeds: Tensor) -> FrameState:
        """Streams that all go on from what `save` gave, one for each of `seeds` int64 [R].

        Raises:
            ValueError: it was saved by another model or with another number of frames per pass.
        """
        state = self.begin(seeds)
        for name in ("codes", "told"):
            own, given = getattr(state, name), saved[name]
            if given.shape != own.shape[1:]:
                raise ValueError(f"the saved {name} must be {list(own.shape[1:])}, got {list(given.shape)}")
            own.copy_(given.expand_as(own))
        cache = {name.removeprefix("cache."): value for name, value in saved.items() if name.startswith("cache.")}
        for row in range(len(seeds)):
            state.cache.restore(row, {name: int(v) if v.ndim == 0 else v for name, v in cache.items()})
        state.frames = int(saved["frames"])
        return state

    @torch.no_grad()
    def step(self, state: FrameState, condition: Tensor | None = None, codes: Tensor | None = None) -> Tensor:
        """The next m frames int64 [R, Q, m] of every stream. Changes `state`.

        Args:
            condition: int64 [R, m], the conditioning tokens of those frames, for a model that has them ([R, m, n] for
                n per frame).
            codes: int64 [R, Q, m], frames that are known already (a voice to go on in): they are read, not drawn.

        Raises:
            ValueError: condition or codes of another shape.
        """
        if codes is not None and codes.shape != state.codes.shape:
            raise ValueError(f"known codes must be {list(state.codes.shape)}, a pass of them, got {list(codes.shape)}")
        model, m, rows = self.model, self.count, len(state.seeds)
        told = torch.cat([state.told, model.told(condition, rows, m)], dim=1)
        known = 0 if state.frames == 0 else m  # frames that this pass reads, all but the last drawn
        chunk = state.cache.open(range(rows), max(known, 1))
        rotary, seen = model.rotary(chunk.positions), model.seen(chunk)
        drawn = model.tokens.total(state.codes) if known else model.first.expand(rows, 1, -1)
        width = drawn.shape[1]
        # Places of the pass: the `width` frames up to the first new one, which is frame m of `told`.
        given = drawn + told[:, m + 1 - width : m + 1]
        said = model.layers(given, Where(rotary, seen, model.caches(chunk)))
        found = [self._draw(said, state, 0) if codes is None else codes[:, :, 0]]
        for number in range(1, m):
            drawn = torch.cat([drawn, model.tokens.total(found[-1][..., None])], dim=1)[:, -width:]
            given = drawn + told[:, m + 1 - width + number : m + 1 + number]
            said = model.link(number, said, given, Where(rotary, seen, model.caches(chunk, number)))
            found.append(self._draw(said, state, number) if codes is None else codes[:, :, number])
        chunk.commit()
        state.codes, state.told = torch.stack(found, dim=2), told[:, m:]
        state.frames += m
        return state.codes

    def _draw(self, said: Tensor, state: FrameState, number: int) -> Tensor:
        """The codes [R, Q] of the pass's frame `number`."""
        frames = torch.full_like(state.seeds, state.frames + number)

        def choose(level: int, logits: Tensor) -> Tensor:
            if self.head.temperature == 0:
                return logits.argmax(dim=-1)
            return self.head.invert(logits.float(), philox_uniform(state.seeds, frames, level, ()))

        return self.model.depth.draw(said[:, -1], choose)
