"""Streams that a student draws by itself, to learn from: long ones, in all worlds, with prompts that change.

A student that only ever saw true history never learns to stand on its own frames. So a pool of streams runs on under
the keys of the true game, some for hundreds of frames; a few begin anew each time, from true frames or from nothing.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..models.text_encoder import ByteTextEncoder
from ..models.transformer import CausalTransformer3DModel
from ..samplers import FlowSampler
from ..samplers.flow_sampler import integrate
from ..streaming.kv_cache import KVCache
from .dataset import Episodes
from .trainer import Batch
from .world import FRAMES, WINDOW, phrase_ids

CONTEXT = WINDOW.frames - 1
NEW = FRAMES - CONTEXT
RENEWED, SWITCHED = 0.2, 0.1  # share of streams that begin anew, or walk into another world, at each turn
CALLS_PER_TURN = 8  # batches drawn from one turn: drawing is the slow part, and the student moves slowly
COLD_EVERY = 9  # one batch in so many is of streams that began from nothing; odd, since some learn at every second


class Streams:
    """Draws batches from a pool of the student's streams.

    Args:
        student: its current weights draw; they are copied at every turn.
        sampler: few steps, re-noise rule; its `context_sigma` is the level at which finished frames are shown.
        latents: normalised true latents [N, C, h, w] of all `episodes`.
        rows: streams in the pool.
        batch_size: streams per batch.

    A batch holds, for F frames (`CONTEXT` + `NEW`, or `NEW` alone for streams that began from nothing):
    `latents` [B, F, C, h, w] finished frames; `noisy` [B, NEW, C, h, w] and `level` [B], what one of the sampler's
    steps saw of the new ones; `actions` [B, F, A]; `tokens` [B, 2, S, D] and `after` bool [B, F], as in `flow_loss`.
    """

    def __init__(
        self,
        student: CausalTransformer3DModel,
        sampler: FlowSampler,
        text_encoder: ByteTextEncoder,
        latents: Tensor,
        episodes: Episodes,
        *,
        rows: int,
        batch_size: int,
    ) -> None:
        device = latents.device
        self.student, self.sampler, self.text_encoder, self.latents = student, sampler, text_encoder, latents
        self.rows, self.batch_size, self.calls = rows, batch_size, 0
        self.dtype = torch.bfloat16 if latents.is_cuda else torch.float32
        self.actor = cast("CausalTransformer3DModel", CausalTransformer3DModel.from_config(student.config))
        self.actor.to(device=device, dtype=self.dtype).eval()  # pyright: ignore[reportCallIssue]  (wrapped overloads)
        self.actions, self.world = episodes.actions.to(device), episodes.world.to(device)
        self.held_out = episodes.held_out.to(device)
        self.starts = episodes.windows(FRAMES, "train").to(device)
        self.phrases = phrase_ids(episodes.names, text_encoder).to(device)
        config = student.config
        self.cache = KVCache(
            layers=config["num_layers"],
            rows=rows,
            heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            tokens_per_frame=latents.shape[2] * latents.shape[3] // 4,
            window=WINDOW,
            device=device,
            dtype=self.dtype,
        )
        self.pointer = torch.zeros(rows, dtype=torch.long, device=device)  # the frame whose keys come next
        self.tokens = self._read(self.pointer)[:, None].repeat(1, 2, 1, 1)  # of the prompt before and now
        self.history = torch.zeros(rows, FRAMES, *latents.shape[1:], device=device)
        self.pressed = torch.zeros(rows, FRAMES, self.actions.shape[1], device=device)
        self.noisy = torch.zeros(rows, NEW, *latents.shape[1:], device=device)
        self.level = torch.zeros(rows, device=device)
        self.changed = torch.zeros(rows, dtype=torch.bool, device=device)
        self.turn(renewed=1.0, cold=0.0)
        self.turn()

    def __call__(self) -> Batch:
        if self.calls and self.calls % CALLS_PER_TURN == 0:
            self.turn()
        self.calls += 1
        cold = self.calls % COLD_EVERY == 0 and bool(self.cold.any())
        able = (self.cold if cold else ~self.cold & ~self.true).nonzero()[:, 0]
        size = self.batch_size // 4 if cold else self.batch_size
        rows = able[torch.randint(len(able), (size,), device=able.device)]
        first = CONTEXT if cold else 0
        after = torch.ones(size, FRAMES, dtype=torch.bool, device=able.device)
        after[:, :CONTEXT] = ~self.changed[rows, None]
        return {
            "latents": self.history[rows, first:],
            "noisy": self.noisy[rows],
            "level": self.level[rows],
            "actions": self.pressed[rows, first:],
            "tokens": self.tokens[rows],
            "after": after[:, first:],
        }

    @torch.no_grad()
    def turn(self, renewed: float = RENEWED, cold: float = 0.5) -> None:
        """Every stream goes on by `NEW` frames; a share `renewed` begins anew, and `cold` of those from nothing."""
        self.actor.load_state_dict(self.student.state_dict())
        self._choose(renewed, cold)
        keys = self.actor.embed_text(self.tokens[:, 1].to(self.dtype))
        sigmas = self.sampler.sigmas()
        step_of = torch.randint(len(sigmas) - 1, (self.rows,), device=self.pointer.device)
        self.level = torch.tensor(sigmas, device=self.pointer.device)[step_of]
        self.history = self.history.roll(-NEW, dims=1)
        self.pressed = self.pressed.roll(-NEW, dims=1)
        for new, place in enumerate(range(CONTEXT, FRAMES)):
            index = self.pointer + new
            actions = self.actions[index].float()
            chunk = self.cache.open(range(self.rows))

            def flow(x: Tensor, sigma: float, actions=actions, chunk=chunk) -> Tensor:
                level = self.sampler.timestep(torch.full((self.rows, 1), sigma, device=x.device))
                inputs = {"actions": actions[:, None], "text_keys": keys, "cache": chunk, "return_dict": False}
                return self.actor(x.to(self.dtype), level, **inputs)[0].float()

            def drawing(x: Tensor, sigma: float, flow=flow, new=new) -> Tensor:
                mine = (step_of == sigmas.index(sigma))[:, None, None, None]
                self.noisy[:, new] = torch.where(mine, x[:, :, 0], self.noisy[:, new])
                return flow(x, sigma)

            x = torch.randn_like(self.history[:, 0])[:, :, None]
            x = integrate(drawing, x, sigmas, self.sampler.rule, noise=lambda step, like=x: torch.randn_like(like))
            frame = torch.where(self.true[:, None, None, None], self.latents[index].float(), x[:, :, 0])
            shown = self.sampler.config["context_sigma"]
            flow(self.sampler.add_noise(frame, torch.randn_like(frame), shown)[:, :, None], shown)
            chunk.commit()
            self.history[:, place], self.pressed[:, place] = frame, actions
        self.pointer = self.pointer + NEW

    def _choose(self, renewed: float, cold: float) -> None:
        """Who begins anew, from true frames or from nothing, and who walks into another world."""
        device = self.pointer.device
        ahead = (self.pointer[:, None] + torch.arange(NEW, device=device)).clamp_max(len(self.world) - 1)
        ended = self.held_out[ahead].any(dim=1) | (self.world[ahead] != self.world[ahead[:, :1]]).any(dim=1)
        fresh = ended | (torch.rand(self.rows, device=device) < renewed)
        self.cold = fresh & (torch.rand(self.rows, device=device) < cold)
        self.true = fresh & ~self.cold
        self.changed = ~fresh & (torch.rand(self.rows, device=device) < SWITCHED)
        moved = fresh | self.changed
        anywhere = self.starts[torch.randint(len(self.starts), (self.rows,), device=device)]
        self.pointer = torch.where(moved, anywhere, self.pointer)
        said = torch.where(moved[:, None, None], self._read(self.pointer), self.tokens[:, 1])
        self.tokens = torch.stack([self.tokens[:, 1], said], dim=1)
        for row in fresh.nonzero()[:, 0].tolist():
            self.cache.reset(row)

    @torch.no_grad()
    def _read(self, pointer: Tensor) -> Tensor:
        """Prompt tokens [rows, S, D]: one of the phrasings of each stream's world."""
        which = torch.randint(self.phrases.shape[1], pointer.shape, device=pointer.device)
        return self.text_encoder(self.phrases[self.world[pointer], which])
