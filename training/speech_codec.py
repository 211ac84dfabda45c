"""Recipe of the audio codec: speech that sounds the same after it went through few numbers a second.

    millstream train speech-codec --data data/speech --out runs/speech-codec --minutes 5

Log mel spectra at three resolutions say what is heard, and a tracker says the pitch that the first latent must be. Some
clips go through the residual codes and the rest through latents with a little noise, so one decoder understands both.
A judge that says what sounds made can come in for the last third of the time. `envelope`, the L1 of the log mel
spectrum at 80 bands, is what decides whether speech is understood: it must fall to about 0.1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from ..models.audio_codec import AudioCodec
from .audio_losses import ENVELOPE, Judge, MelDistance
from .pitch import track
from .speech_data import Speech
from .trainer import Batch, Budget, Trainer, add_budget, budget_from

QUANTIZED = 0.3  # share of clips that go through the codes
LATENT_NOISE = 0.15  # of a latent's deviation: the speaking model will not hit latents exactly
PITCH_NOISE = 0.02  # of the pitch's: what is off by more would be another voice
FRAMES = 32  # of a clip
LATE = 2 / 3  # of the time is over when the judge comes


class AudioCodecObjective(nn.Module):
    """`batch["samples"]`: int16 [B, S]; `batch["progress"]`: share of the time that is over.

    Args:
        codec: to be trained.
        adversarial: weight of the judge, 0 for none.
    """

    def __init__(self, codec: AudioCodec, adversarial: float = 0.0) -> None:
        super().__init__()
        self.codec, self.adversarial = codec, adversarial
        self.distance, self.envelope = MelDistance(codec.sample_rate), MelDistance(codec.sample_rate, ENVELOPE)
        self.judge = Judge() if adversarial else None

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        waveform = as_waveform(batch["samples"])
        raw = self.codec.encoder(waveform).float()
        shown, code_loss = self.disturbed(raw)
        late = self.codec.delay
        made, true = self.codec.decoder(shown)[..., late:].float(), waveform[..., :-late]
        with torch.autocast(made.device.type, enabled=False):
            heard, pitch = self.distance(made, true), self.pitch(raw, waveform)
            envelope = self.envelope(made.detach(), true)
        size = (raw[:, 1:].square().mean() - 1).square()
        loss = 15 * heard + 5 * pitch + code_loss + 1e-2 * size
        logs = {"envelope": envelope, "mel": heard.detach(), "pitch": pitch.detach(), "codes": code_loss.detach()}
        if self.judge is not None and float(batch["progress"]) >= LATE:
            learn, fool, match = self.judge(made, true)
            loss = loss + learn + self.adversarial * (fool + 2 * match)
            logs["judge"] = learn.detach()
        return loss, logs

    def pitch(self, raw: Tensor, waveform: Tensor) -> Tensor:
        """How far the first latent is from the pitch where there is a voice, in half octaves."""
        step, late = self.codec.config["step"], self.codec.config["window"] // 2
        true, voiced = track(waveform, step, late, self.codec.sample_rate)
        wrong = (self.codec.decoder.source.glide(raw[:, 0]) - true).abs() * voiced
        return wrong.sum() / voiced.sum().clamp_min(1)

    def disturbed(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder gets: codes for some clips, latents with noise for the others; and the codes' loss."""
        rows, levels = len(raw), len(self.codec.quantizer.levels)
        used = torch.randint(1, levels + 1, (rows,), device=raw.device)
        with torch.autocast(raw.device.type, enabled=False):
            coded, loss = self.codec.quantizer(raw, used)
        scale = LATENT_NOISE * raw.detach().std(dim=(0, 2), keepdim=True)
        scale[:, 0] *= PITCH_NOISE / LATENT_NOISE
        through = torch.rand(rows, 1, 1, device=raw.device) < QUANTIZED
        return torch.where(through, coded, raw + scale * torch.randn_like(raw)), loss


def as_waveform(samples: Tensor) -> Tensor:
    """int16 [B, S] to float [B, 1, S] in [-1, 1]."""
    return samples[:, None].float() / 32768


def clips(speech: Speech, count: int, length: int) -> Tensor:
    """`count` random clips int16 [count, length]."""
    device = speech.samples.device
    start = torch.randint(len(speech.samples) - length, (count,), device=device)
    return speech.samples[start[:, None] + torch.arange(length, device=device)]


@torch.no_grad()
def encode_all(codec: AudioCodec, speech: Speech, *, raw: bool = False, frames: int = 256) -> Tensor:
    """Latents [C, T] of all shards, one after the other, each from its own start on. `raw`: as the network makes them.

    The shards run side by side as the rows of one stream.
    """
    starts, hop = speech.shards, codec.hop
    lengths = starts.diff() // hop
    longest = int(lengths.max())
    state, parts = codec.begin(len(lengths)), []
    offset = torch.arange(frames * hop, device=speech.samples.device)
    for first in range(0, longest, frames):
        place = (starts[:-1, None] + first * hop + offset).clamp_max(len(speech.samples) - 1)
        latents = codec.encode_step(as_waveform(speech.samples[place]).to(codec.latent_mean.dtype), state)
        parts.append((codec._raw(latents) if raw else latents).half())
    latents = torch.cat(parts, dim=-1)
    return torch.cat([row[:, :length] for row, length in zip(latents, lengths.tolist())], dim=-1)


@torch.no_grad()
def measure_latents(codec: AudioCodec, speech: Speech) -> None:
    """Set the codec's latent mean and deviation from all shards."""
    raw = encode_all(codec, speech, raw=True).float()
    codec.latent_mean.copy_(raw.mean(dim=1))
    codec.latent_std.copy_(raw.std(dim=1).clamp_min(1e-3))


@torch.no_grad()
def report(codec: AudioCodec, speech: Speech, seconds: int = 8, count: int = 16) -> dict[str, float]:
    """Envelope distance of the first seconds of some shards: after latents, after codes, and of silence to compare."""
    length = seconds * codec.sample_rate // codec.hop * codec.hop
    starts = speech.shards[:-1][:count]
    place = (starts[:, None] + torch.arange(length, device=starts.device)).clamp_max(len(speech.samples) - 1)
    true = as_waveform(speech.samples[place])
    distance = MelDistance(codec.sample_rate, ENVELOPE).to(true.device)
    latents, late = codec.encode(true), codec.delay
    heard = {
        "latents": codec.decode(latents),
        "codes": codec.decode(codec.dequantize(codec.quantize(latents))),
        "one level": codec.decode(codec.dequantize(codec.quantize(latents)[:, :1])),
        "silence": torch.zeros_like(true),
    }
    return {name: round(float(distance(made[..., late:], true[..., :-late])), 4) for name, made in heard.items()}


def train(
    codec: AudioCodec, speech: Speech, budget: Budget, out: Path, *, batch_size: int, adversarial: float, seed: int
) -> None:
    """Train `codec` and save it to `out` (`save_pretrained` layout)."""
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    set_seed(seed, device_specific=True)
    device = accelerator.device
    speech = speech.to(device)
    objective = AudioCodecObjective(codec.to(device), adversarial)  # pyright: ignore[reportArgumentType]
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        codec.encoder.blocks.compile()
        codec.decoder.blocks.compile()

    trainer = Trainer(objective, budget, out, accelerator)

    def batch() -> Batch:
        return {
            "samples": clips(speech, batch_size, FRAMES * codec.hop),
            "progress": torch.tensor(trainer.progress),
        }

    trainer.fit(batch, title="speech codec")
    if accelerator.is_main_process:
        plain: Any = AudioCodec.from_config(codec.config)  # without the compiled call: shapes differ now
        plain.load_state_dict(codec.state_dict())
        plain.to(device).eval()
        measure_latents(plain, speech)
        plain.save_pretrained(out)
        print(f"envelope: {report(plain, speech)}")
    accelerator.wait_for_everyone()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="millstream train speech-codec", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of shards (millstream train speech-data)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its checkpoint")
    parser.add_argument(
        "--adversarial", type=float, default=0.0, help="weight of a judge in the last third (default: 0)"
    )
    add_budget(parser, minutes=8.0, batch_size=96, unit="clips of 1.28 s", rate=2e-3)
    arguments = parser.parse_args(argv)
    budget = budget_from(arguments, weight_decay=0.0, checkpoint_minutes=1.0)
    set_seed(arguments.seed)
    codec = AudioCodec()
    speech = Speech.open(arguments.data, codec.hop)
    train(
        codec,
        speech,
        budget,
        arguments.out,
        batch_size=arguments.batch_size,
        adversarial=arguments.adversarial,
        seed=arguments.seed,
    )


if __name__ == "__main__":
    main()
