"""Recipe that makes a world fast, sharp and steady: few steps, learnt on the student's own streams.

    millstream train distill --data data/freedoom --codec runs/codec --world runs/world --out runs/fast --minutes 10

A model of the flow draws sharply in twenty steps and blurs in two. Here the student draws in two, on streams of its own
(Self-Forcing, arXiv:2506.08009), and is moved to where a frozen teacher finds its frames likelier than a third network
does, which keeps learning what the student draws (distribution matching distillation, DMD2, arXiv:2405.14867). Teacher
and third network are the world's own recipe: they judge windows with a noise level per frame, so that history blurred
by noise gives them a view of a window as a whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from ..models.frame_codec import FrameAutoencoder
from ..models.text_encoder import ByteTextEncoder
from ..models.transformer import CausalTransformer3DModel
from ..samplers import FlowSampler, clean
from .dataset import Episodes
from .streams import NEW, Streams
from .trainer import Batch, Budget, Trainer, add_budget, budget_from
from .world import CLEAN_SIGMA, FRAMES, WINDOW, encode_all, flow_loss, noise_levels, noised, predict_flow

CRITIC_RATE = 4.0  # the critic must follow the student closely, so it learns faster
DRAW_EVERY = 2  # and more often


class DistillObjective(nn.Module):
    """Distribution matching on batches of `Streams`; the critic learns at every call, the student at every second.

    Args:
        student: learns; both others begin as copies of it.
        context_sigma: level at which finished frames are shown to those that follow.
    """

    rates: ClassVar = {"critic": CRITIC_RATE}

    def __init__(self, student: CausalTransformer3DModel, context_sigma: float) -> None:
        super().__init__()
        self.student, self.critic = student, deepcopy(student)
        self.teacher = deepcopy(student).requires_grad_(False)
        self.context_sigma, self.calls = context_sigma, 0
        self.masks: dict[tuple[int, bool], Tensor | BlockMask] = {}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        drawing = self.calls % DRAW_EVERY == 1  # the first one too, which is there to compile
        if batch["latents"].shape[1] == FRAMES:
            return self.judge(batch, drawing)
        with torch.compiler.set_stance("force_eager"):  # the rare short windows are not worth compiling for
            return self.judge(batch, drawing)

    def judge(self, batch: Batch, drawing: bool) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.set_grad_enabled(drawing):
            drawn = self.draw(batch)
        context = batch["latents"][:, :-NEW].movedim(1, 2)
        clip = torch.cat([context, drawn.detach()], dim=2)
        tokens = batch["tokens"].flatten(0, 1)
        seen = (batch["actions"], tokens, batch["after"], self.mask(clip, twice=False))
        loss = flow_loss(self.critic, clip, *seen)
        logs = {"critic": loss.detach(), "texture": drawn.detach().diff(dim=-1).abs().mean()}
        if drawing:
            matching, gap = self.match(drawn, clip, seen)
            loss, logs = loss + matching, logs | {"gap": gap}
        return loss, logs

    def draw(self, batch: Batch) -> Tensor:
        """One sampler step of all new frames at once, given the finished ones: clean frames [B, C, NEW, h, w]."""
        finished, noisy = batch["latents"].movedim(1, 2), batch["noisy"].movedim(1, 2)
        frames = finished.shape[2]
        shown = torch.full((finished.shape[0], frames), self.context_sigma, device=finished.device)
        level = batch["level"][:, None].expand(-1, NEW)
        place = torch.arange(frames, device=finished.device)
        both = torch.cat([place, place[-NEW:]])
        flow = predict_flow(
            self.student,
            torch.cat([noised(finished, torch.randn_like(finished), shown), noisy], dim=2),
            torch.cat([shown, level], dim=1),
            batch["actions"][:, both],
            batch["tokens"].flatten(0, 1),
            batch["after"][:, both],
            self.mask(finished, twice=True),
            both,
        )
        return clean(noisy, flow[:, :, frames:], batch["level"][:, None, None, None, None])

    def match(
        self, drawn: Tensor, clip: Tensor, seen: tuple[Tensor, Tensor, Tensor, Tensor | BlockMask]
    ) -> tuple[Tensor, Tensor]:
        """A loss whose gradient is the (scaled) difference of the two scores (DMD, arXiv:2311.18828, eq. 7 and 8)."""
        with torch.no_grad():
            sigma, _ = noise_levels(clip.shape[0], clip.shape[2], clip.device)
            noisy = noised(clip, torch.randn_like(clip), sigma)
            level = sigma[:, None, -NEW:, None, None]
            likely, drawable = (
                clean(noisy[:, :, -NEW:], predict_flow(network, noisy, sigma, *seen)[:, :, -NEW:], level)
                for network in (self.teacher, self.critic)
            )
            size = (drawn - likely).abs().mean(dim=(1, 3, 4), keepdim=True).clamp_min(0.05)
            direction = (drawable - likely) / size
            judged = level > CLEAN_SIGMA  # in nearly clean frames there is nothing to tell apart
            target = drawn - direction
        error = ((drawn - target).square() * judged).mean() / judged.float().mean().clamp_min(1e-3)
        return 0.5 * error, (direction.abs() * judged).mean()

    def mask(self, clean: Tensor, *, twice: bool) -> Tensor | BlockMask:
        """Who sees whom; with `twice` the last `NEW` frames stand there again, noisy, and see what came before them."""
        frames, tokens = clean.shape[2], clean.shape[3] * clean.shape[4] // 4
        if (frames, twice) not in self.masks:
            place = torch.arange(frames, device=clean.device)
            place = torch.cat([place, place[-NEW:]]) if twice else place
            noisy = torch.arange(len(place), device=clean.device) >= frames
            compiled = clean.is_cuda and frames == FRAMES
            self.masks[frames, twice] = _mask(place, noisy, tokens, flexible=compiled)
        return self.masks[frames, twice]


def _mask(place: Tensor, noisy: Tensor, tokens: int, *, flexible: bool) -> Tensor | BlockMask:
    def sees(query: Tensor, key: Tensor) -> Tensor:
        past = WINDOW.visible(place[query], place[key]) & ~noisy[key] & (~noisy[query] | (place[key] < place[query]))
        return past | (query == key)

    if flexible:
        length = len(place) * tokens
        return create_block_mask(
            lambda b, h, query, key: sees(query // tokens, key // tokens), None, None, length, length, place.device
        )
    frame = torch.arange(len(place), device=place.device).repeat_interleave(tokens)
    return sees(frame[:, None], frame[None, :])


def train(
    world: Path,
    codec: FrameAutoencoder,
    episodes: Episodes,
    sampler: FlowSampler,
    budget: Budget,
    out: Path,
    *,
    rows: int,
    batch_size: int,
    seed: int,
) -> None:
    """Distil the world at `world` for `sampler`; transformer and text encoder are saved below `out`. One process."""
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    if accelerator.num_processes > 1:
        raise ValueError(
            f"distillation runs in one process, got {accelerator.num_processes}; start it without a launcher"
        )
    set_seed(seed)
    device = accelerator.device
    text_encoder = ByteTextEncoder.from_pretrained(world / "text_encoder", torch_dtype=torch.float32).to(device).eval()
    student = CausalTransformer3DModel.from_pretrained(world / "transformer", torch_dtype=torch.float32)
    objective = DistillObjective(student, sampler.config["context_sigma"]).to(device)
    latents = encode_all(codec, episodes, device)
    streams = Streams(student, sampler, text_encoder, latents, episodes, rows=rows, batch_size=batch_size)
    if device.type == "cuda":
        # Two kinds of block, three networks, two shapes, with and without gradients.
        torch._dynamo.config.recompile_limit = 64
        for network in (objective.student, objective.critic, objective.teacher):
            network.compile_repeated_blocks(fullgraph=True, dynamic=False)
    Trainer(objective, budget, out, accelerator).fit(streams, title="distill")
    student.save_pretrained(out / "transformer")
    text_encoder.save_pretrained(out / "text_encoder")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="millstream train distill", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of shards (millstream train data)")
    parser.add_argument("--codec", type=Path, required=True, help="folder of the trained codec")
    parser.add_argument("--world", type=Path, required=True, help="folder of the trained world")
    parser.add_argument("--out", type=Path, required=True, help="folder for the models and their checkpoint")
    parser.add_argument("--sampler-steps", type=int, default=2, help="steps that the student draws in")
    parser.add_argument("--shift", type=float, default=3.0, help="warps the levels towards the noisy end")
    parser.add_argument("--context-sigma", type=float, default=0.1, help="level at which finished frames are shown")
    parser.add_argument("--rows", type=int, default=256, help="streams that the student draws")
    add_budget(parser, minutes=10.0, batch_size=64, unit="windows of 32 frames", rate=8e-5)
    arguments = parser.parse_args(argv)
    train(
        arguments.world,
        FrameAutoencoder.from_pretrained(arguments.codec),
        Episodes.open(arguments.data),
        FlowSampler(
            num_inference_steps=arguments.sampler_steps,
            shift=arguments.shift,
            rule="renoise",
            context_sigma=arguments.context_sigma,
        ),
        budget_from(
            arguments,
            muon_scale=0.0,
            warmup_steps=50,
            ema_decay=0.998,
        ),
        arguments.out,
        rows=arguments.rows,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )


if __name__ == "__main__":
    main()
