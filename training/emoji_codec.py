"""Recipe of the picture tokens: a VQ autoencoder that brings every emoji back sharply.

    millstream train emoji-codec --data data/emoji.safetensors --out runs/emoji-codec --minutes 8

The loss is that of the frame codec (L1 and picture gradients keep edges, a squared term serves PSNR) plus the
codebook's. Pictures are moved and mirrored now and then, so that in-painting understands pictures it has not seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from ..models.vq_codec import VQAutoencoder
from .emoji_data import Emojis
from .trainer import Batch, Budget, Trainer, add_budget, budget_from

MOVED = 0.5  # share of pictures that are moved or mirrored
REACH = 4  # pixels


class VQObjective(nn.Module):
    """`batch["pictures"]`: uint8 [N, S, S, 3]."""

    def __init__(self, codec: VQAutoencoder) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        pictures = as_float(batch["pictures"])
        quantized = self.codec.quantize(self.codec.encode_raw(pictures))
        drawn = self.codec.decode_raw(quantized.latents).float()
        error = drawn - pictures
        squared = error.square().mean()
        edges = sum((drawn.diff(dim=dim) - pictures.diff(dim=dim)).abs().mean() for dim in (-1, -2))
        loss = 2 * error.abs().mean() + 0.5 * edges + 60 * squared + quantized.loss
        codes = perplexity(quantized.tokens, self.codec.config["codebook_size"])
        return loss, {"psnr": -10 * squared.detach().log10(), "codes": codes}


def perplexity(tokens: Tensor, vocabulary: int) -> Tensor:
    """How many codes are as good as evenly used by `tokens` [...]: exp of the entropy of their shares."""
    # `bincount` would make the host wait for the device.
    ones = torch.ones(tokens.numel(), device=tokens.device)
    counts = torch.zeros(vocabulary, device=tokens.device).scatter_add_(0, tokens.flatten(), ones)
    return torch.special.entr(counts / counts.sum()).sum().exp()


def as_float(pictures: Tensor) -> Tensor:
    """uint8 [N, S, S, 3] to [N, 3, S, S] in [0, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 255


def moved(pictures: Tensor) -> Tensor:
    """A share of uint8 pictures [N, S, S, 3] mirrored and moved by up to `REACH` pixels; white comes in at the edge."""
    count, side = pictures.shape[:2]
    device = pictures.device
    some = torch.rand(count, device=device) < MOVED
    mirrored = some & (torch.rand(count, device=device) < 0.5)
    shift = torch.randint(-REACH, REACH + 1, (count, 2), device=device) * some[:, None]
    place = torch.arange(side, device=device) - shift[..., None]  # [N, 2, S]
    rows, columns = place.unbind(1)
    columns = torch.where(mirrored[:, None], side - 1 - columns, columns)
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None]
    index = torch.arange(count, device=device)[:, None, None]
    taken = pictures[index, rows.clamp(0, side - 1)[:, :, None], columns.clamp(0, side - 1)[:, None]]
    return torch.where(inside[..., None], taken, 255)


def emoji_codec(size: int = 64, grid: int = 16, codes: int = 1024) -> VQAutoencoder:
    """The shape of the embedded codec: 0.7 M parameters, a grid of 16 x 16 tokens (8 x 8 with one more halving)."""
    shapes = {4: ((48, 96), (1, 1), (2, 2)), 8: ((32, 64, 112), (1, 1, 1), (1, 2, 2))}
    if size / grid not in shapes:
        raise ValueError(f"a grid must be a quarter or an eighth of the pictures' {size} pixels, got {grid}")
    widths, encoder_blocks, decoder_blocks = shapes[size // grid]
    return VQAutoencoder(
        sample_size=size,
        codebook_size=codes,
        widths=widths,
        encoder_blocks=encoder_blocks,
        decoder_blocks=decoder_blocks,
    )


def train(codec: VQAutoencoder, emojis: Emojis, budget: Budget, out: Path, *, batch_size: int, seed: int) -> None:
    """Train `codec` and save it to `out` (`save_pretrained` layout)."""
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    set_seed(seed, device_specific=True)
    device = accelerator.device
    pictures = emojis.pictures.to(device)
    codec.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportArgumentType]  (wrapped overloads)
    if device.type == "cuda":
        codec.encoder.compile()
        codec.decoder.compile()

    def batch() -> Batch:
        return {"pictures": moved(pictures[torch.randint(len(pictures), (batch_size,), device=device)])}

    trainer = Trainer(VQObjective(codec), budget, out, accelerator)
    trainer.fit(batch, title="emoji codec")
    if accelerator.is_main_process:
        codec.save_pretrained(out)
        print(f"PSNR over all {len(pictures)} pictures: {psnr(codec, pictures):.2f} dB")
    accelerator.wait_for_everyone()


@torch.no_grad()
def encode_all(codec: VQAutoencoder, pictures: Tensor, chunk: int = 256) -> Tensor:
    """Tokens [N, T] of uint8 pictures [N, S, S, 3], on their device."""
    return torch.cat([codec.encode(as_float(part)) for part in pictures.split(chunk)])


@torch.compiler.set_stance("force_eager")  # rather than compile for a last, smaller chunk
@torch.no_grad()
def psnr(codec: VQAutoencoder, pictures: Tensor, chunk: int = 256) -> float:
    """Of all pictures [N, S, S, 3] together, in float32."""
    squared = 0.0
    for part in pictures.split(chunk):
        wanted = as_float(part)
        squared += float((codec.decode(codec.encode(wanted)) - wanted).square().sum())
    return float(-10 * torch.tensor(squared / pictures.numel()).log10())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="millstream train emoji-codec", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="the file of millstream train emoji-data")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its checkpoint")
    parser.add_argument("--grid", type=int, default=16, help="tokens a side (default: 16)")
    parser.add_argument("--codes", type=int, default=1024, help="size of the codebook (default: 1024)")
    add_budget(parser, minutes=8.0, batch_size=256, unit="pictures", rate=1e-3)
    arguments = parser.parse_args(argv)
    budget = budget_from(arguments, weight_decay=0.0)
    emojis = Emojis.open(arguments.data)
    set_seed(arguments.seed)
    codec = emoji_codec(emojis.pictures.shape[1], arguments.grid, arguments.codes)
    train(codec, emojis, budget, arguments.out, batch_size=arguments.batch_size, seed=arguments.seed)


if __name__ == "__main__":
    main()
