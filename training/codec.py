"""Recipe of the frame codec: reconstruct held frames sharply from latents that are easy to draw.

    millstream train codec --data data/freedoom --out runs/codec --minutes 10

L1 with its picture gradients keeps edges, a squared term serves PSNR, and a little noise on the latents keeps the
decoder smooth around them, since a diffusion model will never hit them exactly.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from ..models.frame_codec import FrameAutoencoder
from .dataset import Episodes
from .trainer import Batch, Budget, Trainer, add_budget, budget_from

LATENT_NOISE = 0.02


class CodecObjective(nn.Module):
    """`batch["pictures"]`: uint8 [N, H, W, 3]."""

    def __init__(self, codec: FrameAutoencoder) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        pictures = batch["pictures"].permute(0, 3, 1, 2).float() / 255
        latents = self.codec.encode_raw(pictures)
        noisy = latents + LATENT_NOISE * latents.detach().float().std() * torch.randn_like(latents)
        drawn = self.codec.decode_raw(noisy).float()
        error = drawn - pictures
        squared = error.square().mean()
        edges = sum((drawn.diff(dim=dim) - pictures.diff(dim=dim)).abs().mean() for dim in (-1, -2))
        size = (latents.float().square().mean() - 1).square()
        loss = 2 * error.abs().mean() + 0.5 * edges + 60 * squared + 1e-3 * size
        return loss, {"psnr": -10 * squared.detach().log10()}


@torch.no_grad()
def measure_latents(codec: FrameAutoencoder, pictures: Sequence[Tensor]) -> None:
    """Set the codec's latent mean and deviation from batches of uint8 pictures [N, H, W, 3]."""
    raw = torch.cat([encode_pictures(codec, batch).float() for batch in pictures])
    codec.latent_mean.copy_(raw.mean(dim=(0, 2, 3)))
    codec.latent_std.copy_(raw.std(dim=(0, 2, 3)))


def encode_pictures(codec: FrameAutoencoder, pictures: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] to raw latents [N, C, h, w]."""
    return codec.encode_raw(pictures.permute(0, 3, 1, 2).to(codec.dtype) / 255)


def train(
    codec: FrameAutoencoder, episodes: Episodes, budget: Budget, out: Path, *, batch_size: int, seed: int
) -> None:
    """Train `codec` on this process's share of `episodes` and save it to `out` (`save_pretrained` layout)."""
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    episodes = episodes.share(accelerator.process_index, accelerator.num_processes)
    set_seed(seed, device_specific=True)
    device = accelerator.device
    frames = episodes.frames(device)
    mine = episodes.windows(1, "train").to(device)
    codec.to(device, memory_format=torch.channels_last)
    if device.type == "cuda":
        codec.encoder.compile()
        codec.decoder.compile()

    def batch() -> Batch:
        return {"pictures": frames[mine[torch.randint(len(mine), (batch_size,), device=device)]]}

    trainer = Trainer(CodecObjective(codec), budget, out, accelerator)
    trainer.fit(batch, title="codec")
    measure_latents(codec, [batch()["pictures"] for _ in range(max(1, 4096 // batch_size))])
    if accelerator.is_main_process:
        codec.save_pretrained(out)
    accelerator.wait_for_everyone()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="millstream train codec", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of shards (millstream train data)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its checkpoint")
    add_budget(parser, minutes=10.0, batch_size=256, unit="pictures", rate=1e-3)
    arguments = parser.parse_args(argv)
    budget = budget_from(arguments, weight_decay=0.0)
    episodes = Episodes.open(arguments.data)
    train(FrameAutoencoder(), episodes, budget, arguments.out, batch_size=arguments.batch_size, seed=arguments.seed)


if __name__ == "__main__":
    main()
