"""Recipe of infilling: latents of speech drawn between, before and after what is known of them.

    millstream train sound-infill --data data/speech --codec runs/speech-codec --out runs/infill

Half of the batches see everything and learn to fill gaps; the other half see blocks and their past, each block at a
noise level of its own (diffusion forcing, arXiv:2407.01392), and learn to go on. All are told the phonemes and the
voice of every frame; for some nothing is told, so that guidance has something to go away from.
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
from ..models.transformer import CausalTransformer3DModel
from ..pipelines.sound_text import IDS, as_actions
from ..samplers import add_noise
from ..streaming.kv_cache import Window
from .sound_tokens import ToldWindows
from .speech import FRAMES
from .speech_data import Speech
from .trainer import Batch, Budget, Trainer, add_budget, budget_from

WINDOW = Window(64, 0, 4)
UNTOLD = 0.1  # share of clips that are told nothing
CLEAN = 0.5  # share of blocks that are known


class InfillObjective(nn.Module):
    """Flow matching of the frames that are not known.

    Batch: `latents` [B, C, T]; `condition` int64 [B, T, m].
    """

    def __init__(self, model: CausalTransformer3DModel, window: Window = WINDOW) -> None:
        super().__init__()
        self.model, self.window = model, window
        self.texts: list[tuple[Tensor, ...]] = [()] * model.config["num_layers"]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        latents = batch["latents"]
        rows, _, frames = latents.shape
        whole = bool(torch.rand(()) < 0.5)
        known, levels = (gaps if whole else self.blocks)(rows, frames, latents.device)
        sigma = torch.where(known, 0.0, levels)
        noise = torch.randn_like(latents)
        told = torch.rand(rows, 1, 1, device=latents.device) >= UNTOLD
        out = self.model(
            add_noise(latents, noise, sigma[:, None])[..., None, None],
            1000 * sigma,
            text_keys=self.texts,
            actions=as_actions(batch["condition"]) * told,
            window=None if whole else self.window,
            return_dict=False,
        )[0][..., 0, 0]
        wrong = (out.float() - (noise - latents)).square().mean(dim=1)
        loss = (wrong * ~known).sum() / (~known).sum().clamp_min(1)
        return loss, {"flow": loss.detach()}

    def blocks(self, rows: int, frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which frames [B, T] are known, and the level of each of their blocks."""
        count = -(-frames // self.window.block)
        clean, level = torch.rand(2, rows, count, device=device).unbind(0)
        known, levels = (part.repeat_interleave(self.window.block, 1)[:, :frames] for part in (clean < CLEAN, level))
        return known, levels


def gaps(rows: int, frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which frames [B, T] are known: all but a gap of random ends, which is the whole clip in some rows; one level."""
    ends = (torch.rand(rows, 2, device=device) * 1.5 - 0.25).clamp(0, 1) * frames
    first, last = ends.amin(1, keepdim=True), ends.amax(1, keepdim=True)
    place = torch.arange(frames, device=device) + 0.5
    return (place < first) | (place > last), torch.rand(rows, 1, device=device).expand(-1, frames)


def make_model(codec: AudioCodec, *, dim: int, layers: int) -> CausalTransformer3DModel:
    """A backbone on frames of the latents of `codec`, told by actions."""
    return CausalTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=dim // 64,
        attention_head_dim=64,
        in_channels=codec.latent_channels,
        out_channels=codec.latent_channels,
        text_dim=1,
        freq_dim=64,
        ffn_dim=4 * dim,
        num_layers=layers,
        action_dim=IDS,
        cross_attention_layers=(),
    )


def train(
    model: CausalTransformer3DModel,
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
    windows = ToldWindows(codec, speech, coded=False, batch_size=batch_size, frames=frames)
    if device.type == "cuda":
        model.compile()
    Trainer(InfillObjective(model), budget, out, accelerator).fit(windows, title="infilling")
    if accelerator.is_main_process:
        model.save_pretrained(out)
    accelerator.wait_for_everyone()


def main(argv: Sequence[str] | None = None) -> None:
    what = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="millstream train sound-infill", description=what)
    parser.add_argument("--data", type=Path, required=True, help="folder of shards (millstream train speech-data)")
    parser.add_argument("--codec", type=Path, required=True, help="folder of the trained codec")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its checkpoint")
    parser.add_argument("--dim", type=int, default=384, help="width, a multiple of 64 (default: 384)")
    parser.add_argument("--layers", type=int, default=8)
    add_budget(parser, minutes=8.0, batch_size=64, unit="windows of 12.8 s", rate=1e-3)
    arguments = parser.parse_args(argv)
    set_seed(arguments.seed)
    codec = AudioCodec.from_pretrained(arguments.codec, torch_dtype=torch.float32)
    speech = Speech.open(arguments.data, codec.hop)
    model = make_model(codec, dim=arguments.dim, layers=arguments.layers)
    budget = budget_from(arguments, weight_decay=0.01)
    train(model, codec, speech, budget, arguments.out, batch_size=arguments.batch_size, seed=arguments.seed)


if __name__ == "__main__":
    main()
