"""Recipe of the speaking model: phonemes, durations and latents, learnt from speech whose timing is known.

    millstream train speech --data data/speech --codec runs/speech-codec --out runs/speech --minutes 10

The model sees the frames before under noise of a random level, which it is told: so it learns to go on from its own
imperfect frames, and how much to trust them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from ..models.audio_codec import AudioCodec
from ..models.phonemes import PADDING
from ..models.speech import SpeechPlan, SpeechTransformer
from ..samplers import add_noise
from .speech_codec import encode_all
from .speech_data import Speech
from .trainer import Batch, Budget, Trainer, add_budget, budget_from

FRAMES = 160  # of a window
SOUNDS = 320  # that a window's phonemes are padded to
MARGIN = 16  # phonemes before and after a window that are shown
BLIND = 0.1  # share of windows that are not shown what came before
FIRST = 0.2  # share of windows that are taken for the start of a stream
DRAWS = 4  # noise levels per frame in one step: the flow head is cheap


class SpeechObjective(nn.Module):
    """Flow matching of every frame's latents, and the log durations of the sounds.

    Batch: `latents` [B, C, T + 1], the first only ever seen as a past; `tokens` int64 [B, P]; `voice` int64 [B];
    `phoneme` int64, `elapsed`, `length` [B, T, N] (`SpeechPlan`); `slots` [B, P], how long every sound is, and
    `natural` bool [B, P], which of them count.
    """

    def __init__(self, model: SpeechTransformer, frames: int = FRAMES) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mask", model.window.mask(frames, 1), persistent=False)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        encoded = self.model.encode_phonemes(batch["tokens"], batch["voice"])
        plan = SpeechPlan(batch["phoneme"], batch["elapsed"], batch["length"])
        actions = self.model.frame_actions(encoded, plan, batch["voice"])
        previous, sigma = past(batch["latents"][..., :-1])
        said = self.model(previous, sigma, actions, mask=self.mask)
        wanted = batch["latents"][..., 1:].transpose(1, 2).flatten(0, 1)
        flow = self.model.head.loss(wanted.repeat(DRAWS, 1), said.flatten(0, 1).repeat(DRAWS, 1))
        predicted = self.model.duration(encoded)[..., 0].float()
        wrong = (predicted - batch["slots"].clamp_min(1).log()).abs() * batch["natural"]
        duration = wrong.sum() / batch["natural"].sum().clamp_min(1)
        return flow + 0.1 * duration, {"flow": flow.detach(), "duration": duration.detach()}


def past(latents: Tensor) -> tuple[Tensor, Tensor]:
    """The frames before as the model gets to see them, [B, C, T], and the level of noise in them [B]."""
    rows, device = len(latents), latents.device
    sigma = 0.7 * torch.rand(rows, device=device).square()
    sigma = torch.where(torch.rand(rows, device=device) < BLIND, 1.0, sigma)
    starts = torch.rand(rows, 1, device=device) < FIRST
    seen = latents.clone()
    seen[..., 0] = torch.where(starts, 0.0, seen[..., 0])
    return add_noise(seen, torch.randn_like(seen), sigma[:, None, None]), sigma


class Windows:
    """Draws batches of windows of latents with the sounds in them, all on the device.

    Args:
        latents: [C, T] of all shards (`encode_all`).
        slots: per frame.
    """

    def __init__(
        self, latents: Tensor, speech: Speech, *, hop: int, slots: int, batch_size: int, frames: int = FRAMES
    ) -> None:
        device = latents.device
        self.latents, self.speech, self.hop, self.slots = latents, speech, hop, slots
        self.batch_size, self.frames = batch_size, frames
        shards = speech.shards // hop
        starts = [torch.arange(first, last - frames) for first, last in zip(shards.tolist(), shards.tolist()[1:])]
        self.starts = torch.cat(starts).to(device)
        if len(self.starts) == 0:
            raise ValueError(f"no shard is longer than {frames} frames; make the speech data with fewer shards")
        self.tokens = speech.tokens.long()
        self.begins = torch.cat([speech.ends.new_zeros(1), speech.ends[:-1]])
        self.lengths = (speech.ends - self.begins).float() / self.unit

    @property
    def unit(self) -> int:
        """Samples per slot."""
        return self.hop // self.slots

    def __call__(self) -> Batch:
        device = self.latents.device
        start = self.starts[torch.randint(len(self.starts), (self.batch_size,), device=device)]
        frames = start[:, None] + torch.arange(self.frames + 1, device=device)
        # The window's own frames are those after `start`: the frame at `start` is only their past.
        slot = (start[:, None] + 1) * self.slots + torch.arange(self.frames * self.slots, device=device)
        place = slot * self.unit + self.unit // 2
        sound = torch.searchsorted(self.speech.ends, place, right=True).clamp_max(len(self.tokens) - 1)
        first = (sound[:, :1] - MARGIN).clamp_min(0)
        shown = first + torch.arange(SOUNDS, device=device)
        known = (shown <= sound[:, -1:] + MARGIN) & (shown < len(self.tokens))
        shown = shown.clamp_max(len(self.tokens) - 1)
        length = self.lengths[sound]
        elapsed = ((place - self.begins[sound]).float() / self.unit / length.clamp_min(1)).clamp(0, 1)
        shape = (self.frames, self.slots)
        return {
            "latents": self.latents[:, frames].movedim(0, 1).float(),
            "tokens": torch.where(known, self.tokens[shown], PADDING),
            "voice": self.speech.voices[torch.searchsorted(self.speech.shards, start * self.hop, right=True) - 1],
            "phoneme": (sound - first).clamp_max(SOUNDS - 1).unflatten(1, shape),
            "elapsed": elapsed.unflatten(1, shape),
            "length": length.unflatten(1, shape),
            "slots": self.lengths[shown],
            # the margins are seen without all of their neighbours
            "natural": known & self.speech.natural[shown] & (shown >= sound[:, :1]) & (shown <= sound[:, -1:]),
        }


def train(
    model: SpeechTransformer,
    codec: AudioCodec,
    speech: Speech,
    budget: Budget,
    out: Path,
    *,
    batch_size: int,
    seed: int,
    frames: int = FRAMES,
) -> None:
    """Train `model` on the latents of `codec` and save it to `out` (`save_pretrained` layout)."""
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    set_seed(seed, device_specific=True)
    device = accelerator.device
    speech, codec = speech.to(device), codec.to(device).eval()  # pyright: ignore[reportArgumentType]
    latents = encode_all(codec, speech)
    batch = Windows(latents, speech, hop=codec.hop, slots=model.slots, batch_size=batch_size, frames=frames)
    if device.type == "cuda":
        model.phonemes.compile()
        model.backbone.compile()
        model.head.compile()
    Trainer(SpeechObjective(model, frames), budget, out, accelerator).fit(batch, title="speech")
    if accelerator.is_main_process:
        model.save_pretrained(out)
    accelerator.wait_for_everyone()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="millstream train speech", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of shards (millstream train speech-data)")
    parser.add_argument("--codec", type=Path, required=True, help="folder of the trained codec")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its checkpoint")
    parser.add_argument("--dim", type=int, default=192, help="width of the backbone, a multiple of 64 (default: 192)")
    parser.add_argument("--layers", type=int, default=4, help="of the backbone (default: 4)")
    add_budget(parser, minutes=10.0, batch_size=64, unit="windows of 12.8 s", rate=1e-3)
    arguments = parser.parse_args(argv)
    set_seed(arguments.seed)
    codec = AudioCodec.from_pretrained(arguments.codec, torch_dtype=torch.float32)
    speech = Speech.open(arguments.data, codec.hop)
    model = SpeechTransformer(
        latent_channels=codec.latent_channels,
        frame_rate=codec.frame_rate,
        voices=speech.names,
        dim=arguments.dim,
        layers=arguments.layers,
    )
    budget = budget_from(arguments, weight_decay=0.01)
    train(model, codec, speech, budget, arguments.out, batch_size=arguments.batch_size, seed=arguments.seed)


if __name__ == "__main__":
    main()
