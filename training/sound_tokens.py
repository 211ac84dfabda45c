"""Recipe of the generators over residual codes: speech as the codes of a trained codec.

    millstream train sound-tokens --kind masked --data data/speech --codec runs/speech-codec --out runs/masked

Kind "masked" learns to fill in one level of whole clips (`MaskedSoundTransformer`), kind "frames" to go on frame after
frame, with chained heads (`FrameTokenTransformer`). Both are told the phonemes and the voice of every frame.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.audio_codec import AudioCodec
from ..models.frame_tokens import FrameTokenTransformer
from ..models.masked_sound import MaskedSoundTransformer
from ..models.speech import SLOT
from ..pipelines.sound_text import IDS, frame_tokens
from .speech import FRAMES, Windows
from .speech_codec import encode_all
from .speech_data import Speech
from .trainer import Batch, Budget, Trainer, add_budget, budget_from

PROMPTED = 0.5  # share of batches that begin with a prompt


class MaskedObjective(nn.Module):
    """Cross-entropy of one level at the places that are masked. SoundStorm (arXiv:2305.09636), section 3.2.

    Batch: `codes` int64 [B, Q, T], `condition` int64 [B, T, m]. One level and one length of prompt for the batch; every
    row has a share of masked places of its own, by a cosine.
    """

    def __init__(self, model: MaskedSoundTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        codes = batch["codes"]
        rows, levels, frames = codes.shape
        level = int(torch.randint(levels, ()))
        prompt = int(torch.randint(frames // 2, ())) if float(torch.rand(())) < PROMPTED else 0
        share = torch.cos(math.pi / 2 * torch.rand(rows, 1, device=codes.device))
        known = torch.rand(rows, frames, device=codes.device) >= share
        known[:, :prompt] = True
        logits = self.model(codes, known, level, batch["condition"], prompt)
        wrong = F.cross_entropy(logits.flatten(0, 1).float(), codes[:, level].flatten(), reduction="none")
        opened = (~known).flatten()
        loss = (wrong * opened).sum() / opened.sum().clamp_min(1)
        return loss, {"codes": loss.detach()}


class FramesObjective(nn.Module):
    """Cross-entropy of every frame's codes, by the large model and by each chained head alike.

    Batch: as `MaskedObjective`'s.
    """

    def __init__(self, model: FrameTokenTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        codes = batch["codes"].transpose(1, 2)  # [B, T, Q]
        losses = [
            F.cross_entropy(logits.flatten(0, 2).float(), codes[:, number:].flatten())
            for number, logits in enumerate(self.model(batch["codes"], batch["condition"]))
        ]
        loss = torch.stack(losses).mean()
        return loss, {"codes": losses[0].detach(), "chained": losses[-1].detach()}


class ToldWindows:
    """Windows of speech, as latents or as codes, and what is said in them.

    Args:
        codec: on the device.
        speech: on the device.
        coded: whether batches hold `codes` int64 [B, Q, T] or `latents` [B, C, T].
    """

    def __init__(self, codec: AudioCodec, speech: Speech, *, coded: bool, batch_size: int, frames: int) -> None:
        slots = round(1 / (codec.frame_rate * SLOT))
        latents = encode_all(codec, speech)
        self.codec, self.coded = codec, coded
        self.windows = Windows(latents, speech, hop=codec.hop, slots=slots, batch_size=batch_size, frames=frames)

    @torch.no_grad()
    def __call__(self) -> Batch:
        batch = self.windows()
        latents = batch["latents"][..., 1:]
        sound = {"codes": self.codec.quantize(latents)} if self.coded else {"latents": latents}
        return {**sound, "condition": frame_tokens(batch["tokens"], batch["phoneme"], batch["voice"])}


def make_model(
    kind: str, codec: AudioCodec, *, dim: int, layers: int, chained: int
) -> MaskedSoundTransformer | FrameTokenTransformer:
    """A model of that kind for the codes of `codec`."""
    config = codec.config
    shared = {"levels": config["levels"], "vocab_size": config["codebook_size"], "condition_size": IDS, "dim": dim}
    shared |= {"num_heads": dim // 64, "num_layers": layers}
    if kind == "masked":
        return MaskedSoundTransformer(**shared, condition_frames=1, ffn_dim=4 * dim)
    return FrameTokenTransformer(
        **shared, ffn_dim=8 * dim // 3, depth_dim=dim // 2, depth_heads=max(1, dim // 128), chained=chained, window=64
    )


def train(
    model: MaskedSoundTransformer | FrameTokenTransformer,
    codec: AudioCodec,
    speech: Speech,
    budget: Budget,
    out: Path,
    *,
    batch_size: int,
    seed: int,
    frames: int = FRAMES,
) -> None:
    """Train `model` on the codes of `codec` and save it to `out` (`save_pretrained` layout)."""
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    set_seed(seed, device_specific=True)
    device = accelerator.device
    speech, codec = speech.to(device), codec.to(device).eval()  # pyright: ignore[reportArgumentType]
    windows = ToldWindows(codec, speech, coded=True, batch_size=batch_size, frames=frames)
    if device.type == "cuda":
        model.layers.compile()
    objective = MaskedObjective(model) if isinstance(model, MaskedSoundTransformer) else FramesObjective(model)
    Trainer(objective, budget, out, accelerator).fit(windows, title="sound tokens")
    if accelerator.is_main_process:
        model.save_pretrained(out)
    accelerator.wait_for_everyone()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="millstream train sound-tokens", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--kind", choices=("masked", "frames"), default="masked")
    parser.add_argument("--data", type=Path, required=True, help="folder of shards (millstream train speech-data)")
    parser.add_argument("--codec", type=Path, required=True, help="folder of the trained codec")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its checkpoint")
    parser.add_argument("--dim", type=int, default=384, help="width, a multiple of 128 (default: 384)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--chained", type=int, default=3, help="heads behind a model of kind frames (default: 3)")
    add_budget(parser, minutes=8.0, batch_size=64, unit="windows of 12.8 s", rate=1e-3)
    arguments = parser.parse_args(argv)
    set_seed(arguments.seed)
    codec = AudioCodec.from_pretrained(arguments.codec, torch_dtype=torch.float32)
    speech = Speech.open(arguments.data, codec.hop)
    model = make_model(arguments.kind, codec, dim=arguments.dim, layers=arguments.layers, chained=arguments.chained)
    budget = budget_from(arguments, weight_decay=0.01)
    train(model, codec, speech, budget, arguments.out, batch_size=arguments.batch_size, seed=arguments.seed)


if __name__ == "__main__":
    main()
