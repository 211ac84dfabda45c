"""Recipe of a playable world: diffusion forcing over latent frames, steered by buttons and words.

    millstream train world --data data/freedoom --codec runs/codec --out runs/world --minutes 10

Every frame of a window has its own noise level (Diffusion Forcing, arXiv:2407.01392), so one network learns to draw a
frame from any mixture of clean and noisy history, and to begin from nothing. Three choices matter for a long stream:
- the share of nearly clean frames differs from window to window, since a stream always sees nearly clean history;
- some windows are spliced from two worlds, so that a changed prompt walks into the other world;
- the attention mask is the `Window` that the stream's cache will have.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from ..models.frame_codec import FrameAutoencoder
from ..models.text_encoder import ByteTextEncoder
from ..models.transformer import CausalTransformer3DModel
from ..samplers import add_noise
from ..streaming.kv_cache import Window
from .codec import encode_pictures
from .dataset import Episodes
from .prompts import phrases, world_named
from .trainer import Batch, Budget, Trainer, add_budget, budget_from

FRAMES = 32
WINDOW = Window(frames=16)
CLEAN_SIGMA = 0.2
CLEAN_WEIGHT = 0.2
SPLICED = 0.12
UNPROMPTED = 0.05
PHRASES = 4096


class WorldObjective(nn.Module):
    """Flow matching, v = noise - x0, with a noise level per frame.

    Batch: `latents` [B, F, C, h, w]; `actions` [B, F, A]; `prompts` byte ids [B, 2, N] and `worlds` [B, 2], before and
    after a splice; `after` bool [B, F], which of the two a frame belongs to; `captions` byte ids [W, N].
    """

    def __init__(self, transformer: CausalTransformer3DModel, text_encoder: ByteTextEncoder) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder
        self.masks: dict[torch.Size, Tensor | BlockMask] = {}

    def mask(self, latents: Tensor) -> Tensor | BlockMask:
        """Who sees whom; made once, and by FlexAttention where it can train."""
        if latents.shape not in self.masks:
            make = WINDOW.block_mask if latents.is_cuda else WINDOW.mask
            tokens = latents.shape[3] * latents.shape[4] // 4
            self.masks[latents.shape] = make(latents.shape[2], tokens, latents.device)
        return self.masks[latents.shape]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        clean = batch["latents"].movedim(1, 2).float()
        tokens, meaning = self.read(batch)
        loss = flow_loss(self.transformer, clean, batch["actions"], tokens, batch["after"], self.mask(clean))
        return loss + 0.05 * meaning, {"flow": loss.detach(), "words": meaning.detach()}

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Prompt tokens [2 B, S, D], and how badly their meaning tells the worlds apart (cross-entropy to captions)."""
        ids = torch.cat([batch["prompts"].flatten(0, 1), batch["captions"]])
        tokens = self.text_encoder(ids)
        summary = self.text_encoder.summary(tokens)
        count = ids.shape[0] - batch["captions"].shape[0]
        similarity = summary[:count] @ summary[count:].T
        worlds = batch["worlds"].flatten()
        # Divided here, since the mean over no prompt at all (a small batch may draw that) is not a number.
        meaning = F.cross_entropy(similarity / 0.1, worlds, ignore_index=-1, reduction="sum")
        return tokens[:count], meaning / (worlds >= 0).sum().clamp_min(1)


def flow_loss(
    transformer: CausalTransformer3DModel,
    clean: Tensor,
    actions: Tensor,
    tokens: Tensor,
    after: Tensor,
    mask: Tensor | BlockMask,
) -> Tensor:
    """How badly the flow of noised `clean` [B, C, F, h, w] is predicted, with a noise level per frame.

    `tokens` [2 B, S, D] of each window's two prompts, `after` bool [B, F]: which of the two a frame belongs to.
    """
    sigma, weight = noise_levels(clean.shape[0], clean.shape[2], clean.device)
    noise = torch.randn_like(clean)
    flow = predict_flow(transformer, noised(clean, noise, sigma), sigma, actions, tokens, after, mask)
    error = (flow - (noise - clean)).square().mean(dim=(1, 3, 4))
    return (error * weight).mean()


def predict_flow(
    transformer: CausalTransformer3DModel,
    noisy: Tensor,
    sigma: Tensor,
    actions: Tensor,
    tokens: Tensor,
    after: Tensor,
    mask: Tensor | BlockMask,
    positions: Tensor | None = None,
) -> Tensor:
    """Flow [B, C, F, h, w], float32, of frames at the levels `sigma` [B, F], each under its own prompt."""
    keys = keys_per_frame(transformer, tokens, after)
    # Softmax layers read the mask; linear layers, if the model has any, the window it was made from. Frames that do not
    # stand in their order (with `positions`) are hidden from each other in ways that only a mask can say.
    window = WINDOW if positions is None else None
    (flow,) = transformer(
        noisy,
        sigma * 1000,
        actions=actions,
        text_keys=keys,
        mask=mask,
        window=window,
        positions=positions,
        return_dict=False,
    )
    return flow.float()


def keys_per_frame(transformer: CausalTransformer3DModel, tokens: Tensor, after: Tensor) -> list[tuple[Tensor, ...]]:
    """Keys of each window's two prompts, dealt out to its frames: [B F, S, H, d]."""
    pairs = torch.arange(after.shape[0], device=after.device)[:, None] * 2 + after.long()
    return [tuple(key[pairs.flatten()] for key in keys) for keys in transformer.embed_text(tokens)]


def noised(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Frames [B, C, F, h, w] at the levels `sigma` [B, F]."""
    return add_noise(clean, noise, sigma[:, None, :, None, None])


def noise_levels(batch: int, frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sigma [B, F] in [0, 1] and loss weights: a share of each window, different for each, is nearly clean."""
    sigma = torch.sigmoid(torch.randn(batch, frames, device=device) + 0.3)
    share = torch.rand(batch, 1, device=device)
    nearly_clean = torch.rand(batch, frames, device=device) < share
    weight = torch.where(nearly_clean, CLEAN_WEIGHT, 1.0)
    return torch.where(nearly_clean, sigma * CLEAN_SIGMA, sigma), weight / weight.mean()


def phrase_ids(names: Sequence[str], tokenizer: ByteTextEncoder) -> Tensor:
    """`PHRASES` phrasings of each world, as byte ids [worlds, PHRASES, N]."""
    chance = random.Random(0)
    return torch.stack(
        [tokenizer.tokenize([phrases(world_named(name), chance) for _ in range(PHRASES)]) for name in names]
    )


class Windows:
    """Draws batches of latent windows with their actions and prompts, some spliced from two worlds."""

    def __init__(self, latents: Tensor, episodes: Episodes, tokenizer: ByteTextEncoder, batch_size: int) -> None:
        device = latents.device
        self.latents, self.batch_size = latents, batch_size
        self.actions, self.world = episodes.actions.to(device), episodes.world.to(device)
        self.starts = episodes.windows(FRAMES, "train").to(device)
        self.prompts = phrase_ids(episodes.names, tokenizer).to(device)
        self.captions = tokenizer.tokenize([world_named(name).caption for name in episodes.names]).to(device)
        self.silence = tokenizer.tokenize([""])[0].to(device)

    def __call__(self) -> Batch:
        size, device = self.batch_size, self.latents.device
        pair = self.starts[torch.randint(len(self.starts), (size, 2), device=device)]
        spliced = torch.rand(size, 1, device=device) < SPLICED
        cut = torch.randint(1, FRAMES, (size, 1), device=device)
        frame = torch.arange(FRAMES, device=device)
        after = spliced & (frame >= cut)
        index = torch.where(after, pair[:, 1:], pair[:, :1]) + frame
        worlds = self.world[pair]
        prompts = self.prompts[worlds, torch.randint(PHRASES, (size, 2), device=device)]
        silent = torch.rand(size, 2, device=device) < UNPROMPTED
        return {
            "latents": self.latents[index],
            "actions": self.actions[index].float(),
            "prompts": torch.where(silent[..., None], self.silence, prompts),
            "worlds": worlds.masked_fill(silent, -1),
            "after": after,
            "captions": self.captions,
        }


@torch.no_grad()
def encode_all(codec: FrameAutoencoder, episodes: Episodes, device: torch.device, chunk: int = 512) -> Tensor:
    """Normalised latents [N, C, h, w] of every frame, bfloat16 on CUDA, in the order of `episodes`."""
    codec.eval().to(device, memory_format=torch.channels_last)  # pyright: ignore[reportArgumentType]  (wrapped overloads)
    cuda = device.type == "cuda"
    mean, std = codec.latent_mean[:, None, None], codec.latent_std[:, None, None]
    parts = []
    for shard in episodes.shards:
        for pictures in shard.split(chunk):
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                raw = encode_pictures(codec, pictures.to(device))
            parts.append(((raw.float() - mean) / std).to(torch.bfloat16 if cuda else torch.float32))
    return torch.cat(parts)


def world_transformer(
    latent_channels: int, actions: int, text_dim: int, grid: tuple[int, int]
) -> CausalTransformer3DModel:
    """The shape of the embedded world: 5.8 M parameters, 48 tokens a frame at 96x128."""
    return CausalTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=text_dim,
        ffn_dim=768,
        num_layers=7,
        action_dim=actions,
        cross_attention_layers=(1, 4),
        position_grid=grid,
    )


def train(
    codec: FrameAutoencoder,
    episodes: Episodes,
    budget: Budget,
    out: Path,
    *,
    batch_size: int,
    seed: int,
    start: Path | None = None,
) -> None:
    """Train a transformer and its text encoder on this process's share of `episodes`; save both below `out`.

    Args:
        start: folder of a trained world to go on from; fresh weights by default.
    """
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    episodes = episodes.share(accelerator.process_index, accelerator.num_processes)
    set_seed(seed)  # the same first weights everywhere
    if start is not None:
        text_encoder = ByteTextEncoder.from_pretrained(start / "text_encoder", torch_dtype=torch.float32)
        transformer = CausalTransformer3DModel.from_pretrained(start / "transformer", torch_dtype=torch.float32)
    else:
        text_encoder = ByteTextEncoder()
        grid = (episodes.size[0] // 16, episodes.size[1] // 16)
        transformer = world_transformer(
            codec.config["latent_channels"], len(episodes.buttons), text_encoder.config["dim"], grid
        )
    latents = encode_all(codec, episodes, accelerator.device)
    set_seed(seed, device_specific=True)
    if accelerator.device.type == "cuda":
        transformer.compile()
    trainer = Trainer(WorldObjective(transformer, text_encoder), budget, out, accelerator)
    trainer.fit(Windows(latents, episodes, text_encoder, batch_size), title="world")
    if accelerator.is_main_process:
        transformer.save_pretrained(out / "transformer")
        text_encoder.save_pretrained(out / "text_encoder")
    accelerator.wait_for_everyone()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="millstream train world", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of shards (millstream train data)")
    parser.add_argument("--codec", type=Path, required=True, help="folder of the trained codec")
    parser.add_argument("--out", type=Path, required=True, help="folder for the models and their checkpoint")
    parser.add_argument("--start", type=Path, help="folder of a trained world whose weights to go on from")
    add_budget(parser, minutes=10.0, batch_size=64, unit="windows of 32 frames", rate=6e-4)
    arguments = parser.parse_args(argv)
    budget = budget_from(arguments)
    codec = FrameAutoencoder.from_pretrained(arguments.codec)
    episodes = Episodes.open(arguments.data)
    train(
        codec,
        episodes,
        budget,
        arguments.out,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        start=arguments.start,
    )


if __name__ == "__main__":
    main()
