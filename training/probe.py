"""Which keys were held? An inverse-dynamics probe that reads the buttons from the frames alone.

Trained on true frames, then shown generated ones: if it reads back the keys that steered the model, the model obeys
them. Four frames go in, and the answer is the action of the middle transition, from the second frame to the third:
with one frame on either side of it, a recoil or a step that shows a frame late still counts.

What cannot be seen cannot be read: ATTACK without a weapon, or walking into a wall. So a reading of generated frames is
compared with the same probe's reading of true ones (`measures.above_chance`), never with 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT = 4
"""Frames the probe sees at once."""
MIDDLE = 2
"""It reads the action that led to this one of them."""


class Probe(nn.Module):
    """uint8 frames [B, 4, H, W, 3] -> logits [B, buttons]; H and W are multiples of 32."""

    def __init__(self, buttons: int, size: tuple[int, int], width: int = 64) -> None:
        super().__init__()
        if size[0] % 32 or size[1] % 32:
            raise ValueError(f"frame height and width must be multiples of 32, got {size}")
        channels = (width, 2 * width, 3 * width, 4 * width)
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(4 * 3 * CONTEXT, width, 3, padding=1), nn.SiLU()]
        for narrow, wide in zip(channels, (*channels[1:], channels[-1])):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.GroupNorm(8, wide), nn.SiLU()]
        # The place of a change tells turning from walking, so the map is flattened, not averaged.
        cells = (size[0] // 32) * (size[1] // 32)
        layers += [
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(cells * channels[-1], 256),
            nn.SiLU(),
            nn.Linear(256, buttons),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames.movedim(-1, 2).float() / 127.5 - 1  # [B, 4, 3, H, W]
        # Differences first: most pixels stay, and what moved is what a button did.
        x = torch.cat([x[:, 1:] - x[:, :-1], x[:, MIDDLE : MIDDLE + 1]], 1)
        return self.layers(x.flatten(1, 2).contiguous(memory_format=torch.channels_last))


def train_probe(
    frames: Tensor,
    actions: Tensor,
    starts: Tensor,
    *,
    device: torch.device | str = "cpu",
    steps: int = 3000,
    batch_size: int = 512,
    learning_rate: float = 1e-3,
    width: int = 64,
    generator: torch.Generator | None = None,
) -> Probe:
    """Train a probe on true frames.

    Args:
        frames: uint8 [N, H, W, 3], on any device; batches are gathered there.
        actions: [N, buttons]; `actions[i]` led to frame `i`.
        starts: first frames of windows of `CONTEXT` frames that stay in one episode: `Episodes.windows(CONTEXT)`.
        steps: of AdamW, with a cosine schedule.
        generator: a CPU generator; decides the initial weights, the batches and the dropout.

    Raises:
        ValueError: no windows, or frames and actions of different length.
    """
    if len(frames) != len(actions) or not len(starts):
        raise ValueError(
            f"need as many actions as frames and a window, got {len(frames)}, {len(actions)}, {len(starts)}"
        )
    device = torch.device(device)
    generator = generator or torch.Generator().manual_seed(0)
    starts, pressed = starts.cpu(), (actions != 0).float().to(device)
    # One right answer for a rare button weighs as much as the many for its absence: that is balanced accuracy.
    share = pressed[(starts + MIDDLE).to(device)].mean(0).clamp(1e-3, 1 - 1e-3)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        probe = Probe(actions.shape[1], (frames.shape[1], frames.shape[2]), width).to(device)
        probe = probe.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(probe.parameters(), learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
        for _ in range(steps):
            start = starts[torch.randint(len(starts), (batch_size,), generator=generator)]
            window = frames[(start[:, None] + torch.arange(CONTEXT)).to(frames.device)].to(device)
            target = pressed[(start + MIDDLE).to(device)]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = probe(window)
            weight = torch.where(target > 0, 0.5 / share, 0.5 / (1 - share))
            loss = F.binary_cross_entropy_with_logits(logits.float(), target, weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return probe.eval()


def read_actions(probe: Probe, frames: Tensor, *, batch_size: int = 512) -> Tensor:
    """The actions that the probe sees in clips.

    Args:
        frames: uint8 [..., T, H, W, 3], T at least `CONTEXT`; the clips lie along the leading dimensions.

    Returns:
        bool [..., T - 3, buttons] on the CPU: row `i` is the action that led to frame `i + 2`, to be compared with
        `actions[..., 2 : T - 1, :]`.
    """
    length = frames.shape[-4]
    if frames.dtype != torch.uint8 or length < CONTEXT:
        raise ValueError(f"need uint8 clips of at least {CONTEXT} frames, got {frames.dtype} {tuple(frames.shape)}")
    clips = frames.reshape(-1, *frames.shape[-4:])
    count = length - CONTEXT + 1
    where = torch.cartesian_prod(torch.arange(len(clips)), torch.arange(count))
    device = next(probe.parameters()).device
    read = []
    with torch.inference_mode():
        for part in where.split(batch_size):
            clip, start = part.to(clips.device).unbind(1)
            window = clips[clip[:, None], start[:, None] + torch.arange(CONTEXT, device=clips.device)]
            read.append((probe(window.to(device)) > 0).cpu())
    return torch.cat(read).reshape(*frames.shape[:-4], count, -1)
