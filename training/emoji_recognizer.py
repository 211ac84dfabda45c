"""A small network that tells which emoji a picture shows: the judge of drawn pictures. It does not ship."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..models.vq_codec import VQAutoencoder
from .emoji_codec import as_float, moved
from .emoji_data import Emojis

WIDTHS = (32, 64, 128, 256)


class Recognizer(nn.Module):
    """Pictures [B, 3, S, S] in [0, 1] to logits [B, N], one for each picture of the data."""

    def __init__(self, pictures: int) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for before, width in zip((3, *WIDTHS), WIDTHS):
            stages += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            stages += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        self.stages = nn.Sequential(*stages)
        # Where something is tells a waving hand from a raised one, so the last map is not averaged away.
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * WIDTHS[-1], pictures))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.stages(pictures * 2 - 1))


def train_recognizer(
    emojis: Emojis, codec: VQAutoencoder, device: torch.device, *, steps: int = 2500, batch_size: int = 256
) -> Recognizer:
    """Train on every picture, moved, mirrored, blurred, tinted and noised, and half of them through the codec.

    So it judges what is drawn and not how cleanly: a picture that the codec smears is still known.
    """
    net = Recognizer(len(emojis.names)).to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    pictures = emojis.pictures.to(device)
    smeared = _through(codec, pictures)
    for _ in tqdm(range(steps), desc="recognizer", unit="step", mininterval=5):
        index = torch.randint(len(pictures), (batch_size,), device=device)
        some = torch.rand(batch_size, 1, 1, 1, device=device) < 0.5
        seen = disturbed(as_float(moved(torch.where(some, smeared[index], pictures[index]))))
        loss = F.cross_entropy(net(seen), index, label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def disturbed(pictures: Tensor) -> Tensor:
    """Pictures [B, 3, S, S] a little blurred, tinted and noised."""
    batch, device = len(pictures), pictures.device
    blurred = F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
    share = torch.rand(batch, 1, 1, 1, device=device)
    tint = 1 + 0.1 * torch.randn(batch, 3, 1, 1, device=device)
    noise = 0.05 * torch.rand(batch, 1, 1, 1, device=device) * torch.randn_like(pictures)
    return (torch.lerp(pictures, blurred, share) * tint + noise).clamp(0, 1)


@torch.no_grad()
def accuracy(net: Recognizer, pictures: Tensor, wanted: Tensor) -> dict[str, float]:
    """How often the wanted picture [B] is the first, and among the first five, of what `pictures` [B, 3, S, S] show."""
    logits = torch.cat([net(part) for part in pictures.split(256)])
    ranks = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = ranks == wanted[:, None].to(ranks.device)
    return {"top1": round(float(hits[:, 0].float().mean()), 4), "top5": round(float(hits.any(1).float().mean()), 4)}


@torch.no_grad()
def _through(codec: VQAutoencoder, pictures: Tensor, chunk: int = 256) -> Tensor:
    """What the codec makes of uint8 pictures [N, S, S, 3], as such again."""
    drawn = [codec.decode(codec.encode(as_float(part))) for part in pictures.split(chunk)]
    return (torch.cat(drawn).permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
