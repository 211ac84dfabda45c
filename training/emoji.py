"""Recipe of pictures from words: a token transformer, trained in random orders together with its text encoder.

    millstream train emoji --data data/emoji.safetensors --codec runs/emoji-codec --out runs/emoji --minutes 9

Every picture is learnt in a new order each time (ARPG, arXiv:2503.10568), so one checkpoint answers to random-order,
masked and raster decoding and to in-painting. A training-only head that tells which picture a phrase means makes
the text encoder see early that "apple, red" and "draw a red apple" are one. `--kind masked` trains MaskGIT instead.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.text_encoder import PADDING, ByteTextEncoder
from ..models.token_transformer import TokenTransformer
from ..models.vq_codec import VQAutoencoder
from .emoji_codec import encode_all
from .emoji_data import Emojis
from .emoji_words import core, frame
from .trainer import Batch, Budget, Trainer, add_budget, budget_from

TrainedKind = Literal["two_pass", "masked"]

CORES = 64  # of each picture
FRAMES = 1 << 14  # that cores are put in
UNPROMPTED = 0.1
RASTER = 0.1  # share of rows learnt from the first place to the last, which random orders hardly ever are


class TokenObjective(nn.Module):
    """Cross-entropy of every token in a random order (kind masked: of the hidden ones), and of which picture is meant.

    Batch: `tokens` int64 [B, N]; `prompts` byte ids [B, L]; `pictures` int64 [B], -1 where the prompt was left out.
    """

    def __init__(self, transformer: TokenTransformer, text_encoder: ByteTextEncoder, pictures: int) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder
        self.prototypes = nn.Parameter(torch.randn(pictures, text_encoder.config["dim"]) * 0.1)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        text = self.text_encoder(batch["prompts"])
        token_loss = self.token_loss(batch["tokens"], text)
        similarity = self.text_encoder.summary(text) @ F.normalize(self.prototypes.float(), dim=-1).T
        meant = F.cross_entropy(similarity / 0.05, batch["pictures"], ignore_index=-1, reduction="sum")
        words = meant / (batch["pictures"] >= 0).sum().clamp_min(1)
        return token_loss + 0.1 * words, {"tokens": token_loss.detach(), "words": words.detach()}

    def token_loss(self, tokens: Tensor, text: Tensor) -> Tensor:
        if self.transformer.config["kind"] == "masked":
            known = random_shown(tokens)
            logits = self.transformer(tokens, text, known=known)
            wanted = tokens.masked_fill(known, -1)
        else:
            order = random_orders(tokens)
            logits = self.transformer(tokens, text, order=order)
            wanted = tokens.gather(1, order)
        return F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=-1)


def random_shown(tokens: Tensor) -> Tensor:
    """Which of [B, N] are shown: all but a share cos(pi r / 2), r uniform, and one at least (MaskGIT)."""
    hidden = torch.cos(torch.rand(len(tokens), 1, device=tokens.device) * torch.pi / 2)
    chance = torch.rand(tokens.shape, device=tokens.device)
    return (chance >= hidden) & (chance > chance.amin(dim=1, keepdim=True))


def random_orders(tokens: Tensor) -> Tensor:
    """A permutation of the places for each row of [B, N], for a share of them the raster."""
    order = torch.rand(tokens.shape, device=tokens.device).argsort(dim=1)
    raster = torch.rand(len(tokens), 1, device=tokens.device) < RASTER
    return torch.where(raster, torch.arange(tokens.shape[1], device=tokens.device), order)


class Captions:
    """Draws batches of picture tokens with phrasings: names and keywords, put among idle words anew each time."""

    def __init__(self, tokens: Tensor, emojis: Emojis, tokenizer: ByteTextEncoder, batch_size: int) -> None:
        device = tokens.device
        self.tokens, self.batch_size = tokens, batch_size
        self.weights = emojis.weights.to(device)
        chance = random.Random(0)
        ids = [
            # Keywords name no skin tone, so they mean the picture without one.
            tokenizer.tokenize([core(name, () if toned else keywords, chance) for _ in range(CORES)]).short()
            for name, keywords, toned in zip(emojis.names, emojis.keywords, emojis.toned.tolist())
        ]
        self.cores = torch.stack(ids).to(device)
        known = sorted({word for name in emojis.names for word in name.lower().split() if len(word) > 2})
        frames = [tokenizer.tokenize(side).short() for side in zip(*(frame(chance, known) for _ in range(FRAMES)))]
        self.before, self.after = (side.to(device) for side in frames)
        self.silence = tokenizer.tokenize([""])[0].to(device)

    def __call__(self) -> Batch:
        size, device = self.batch_size, self.tokens.device
        picture = torch.multinomial(self.weights, size, replacement=True)
        silent = torch.rand(size, device=device) < UNPROMPTED
        return {
            "tokens": self.tokens[picture],
            "prompts": torch.where(silent[:, None], self.silence, self.prompts(picture)),
            "pictures": picture.masked_fill(silent, -1),
        }

    def prompts(self, picture: Tensor) -> Tensor:
        """A phrasing of each picture [B] as bytes [B, L]."""
        row = torch.randint(FRAMES, (len(picture),), device=picture.device)
        cores = self.cores[picture, torch.randint(CORES, (len(picture),), device=picture.device)]
        return joined([self.before[row], cores, self.after[row]])

    @torch.no_grad()
    def meanings(self, encoder: ByteTextEncoder, phrasings: int = 8) -> Tensor:
        """Where `encoder` puts each picture's phrasings on the average [N, dim]."""
        pictures = torch.arange(len(self.cores), device=self.cores.device)
        parts = [
            sum(encoder.summary(encoder(self.prompts(part))) for _ in range(phrasings)) for part in pictures.split(256)
        ]
        return F.normalize(torch.cat([torch.as_tensor(part) for part in parts]), dim=-1)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Texts as `tokenize` gives them [B, L], one after the other with single spaces: int64 [B, L]."""
    text = torch.cat([part.long() for part in parts], dim=1)
    space = text == ord(" ")
    gap = text == PADDING
    # Every text begins and ends with a space: of two with nothing but padding between them the second goes.
    last = torch.where(gap, -1, torch.arange(text.shape[1], device=text.device)).cummax(dim=1).values.roll(1, dims=1)
    last[:, 0] = -1
    doubled = space & (last >= 0) & space.gather(1, last.clamp_min(0))
    gone = gap | doubled
    order = gone.long().argsort(dim=1, stable=True)
    return text.masked_fill(gone, PADDING).gather(1, order)[:, : parts[0].shape[1]]


def emoji_transformer(
    codec: VQAutoencoder, text_dim: int, *, dim: int = 192, layers: int = 3, kind: TrainedKind = "two_pass"
) -> TokenTransformer:
    """The shape of the embedded model: 3 + 3 layers of width 192, 2.7 M parameters with its vocabulary of 1024."""
    return TokenTransformer(
        kind=kind,
        vocab_size=codec.config["codebook_size"],
        grid=(codec.sides[-1], codec.sides[-1]),
        dim=dim,
        num_heads=dim // 64,
        ffn_dim=-(-dim * 7 // 3 // 64) * 64,  # LLaMA has 8 / 3; this keeps all parts within 4 MB
        num_layers=layers if kind == "two_pass" else 2 * layers,
        num_cross_layers=layers if kind == "two_pass" else 0,
        text_dim=text_dim,
        learned_positions=True,
    )


def train(
    codec: VQAutoencoder,
    emojis: Emojis,
    budget: Budget,
    out: Path,
    *,
    batch_size: int,
    seed: int,
    start: Path | None = None,
    dim: int = 192,
    layers: int = 3,
    kind: TrainedKind = "two_pass",
) -> None:
    """Train a transformer and its text encoder; save both below `out`.

    Args:
        start: folder of a trained model to go on from; fresh weights of width `dim` and `layers` layers by default.
    """
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    set_seed(seed)  # the same first weights everywhere
    if start is not None:
        text_encoder = ByteTextEncoder.from_pretrained(start / "text_encoder", torch_dtype=torch.float32)
        transformer = TokenTransformer.from_pretrained(start / "transformer", torch_dtype=torch.float32)
    else:
        text_encoder = ByteTextEncoder(dim=112, tokens=8, layers=2, max_bytes=128)
        transformer = emoji_transformer(codec, text_encoder.config["dim"], dim=dim, layers=layers, kind=kind)
    codec.eval().to(accelerator.device)
    tokens = encode_all(codec, emojis.pictures.to(accelerator.device))
    set_seed(seed, device_specific=True)
    objective = TokenObjective(transformer, text_encoder, len(emojis.names)).to(accelerator.device)
    if accelerator.device.type == "cuda":
        objective.forward = torch.compile(objective.forward)
    captions = Captions(tokens, emojis, text_encoder, batch_size)
    if start is not None:  # the head was not kept; a random one would unteach the encoder
        objective.prototypes.data = captions.meanings(text_encoder)
    trainer = Trainer(objective, budget, out, accelerator)
    trainer.fit(captions, title="emoji")
    if accelerator.is_main_process:
        transformer.save_pretrained(out / "transformer")
        text_encoder.save_pretrained(out / "text_encoder")
    accelerator.wait_for_everyone()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="millstream train emoji", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="the file of millstream train emoji-data")
    parser.add_argument("--codec", type=Path, required=True, help="folder of the trained codec")
    parser.add_argument("--out", type=Path, required=True, help="folder for the models and their checkpoint")
    parser.add_argument("--start", type=Path, help="folder of a trained model whose weights to go on from")
    parser.add_argument("--kind", default="two_pass", choices=get_args(TrainedKind), help="default: %(default)s")
    parser.add_argument("--dim", type=int, default=192, help="width, a multiple of 64 (default: 192)")
    parser.add_argument("--layers", type=int, default=3, help="layers of each pass (default: 3)")
    add_budget(parser, minutes=9.0, batch_size=512, unit="pictures", rate=1e-3)
    arguments = parser.parse_args(argv)
    # Three thousand pictures are to be remembered, not generalised from: no weight decay.
    budget = budget_from(arguments, weight_decay=0.0)
    train(
        VQAutoencoder.from_pretrained(arguments.codec),
        Emojis.open(arguments.data),
        budget,
        arguments.out,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        start=arguments.start,
        dim=arguments.dim,
        layers=arguments.layers,
        kind=arguments.kind,
    )


if __name__ == "__main__":
    main()
