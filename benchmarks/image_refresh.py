"""What `refresh` of `ImagePipeline` saves and changes, of a masked model that has learnt something.

    python benchmarks/image_refresh.py [--out refresh.json] [--steps 450] [--pictures 4]

The shipped emoji model is of kind two_pass, which caches exactly and has no use for `refresh`. So a masked transformer
of about its size is first taught what that model draws of eight prompts: enough that it draws them, each in several
ways, though it knows nothing else. Then it draws again with every refresh, from the same seeds, and the pictures are
compared. Seconds are of one core's work, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from variants import describe, publish

import millstream as ms
from millstream.models.token_transformer import TokenTransformer

PROMPTS = (
    "a red apple",
    "a green apple",
    "one blue heart",
    "a yellow heart",
    "a cat face",
    "a rainbow",
    "the sun",
    "a banana",
)
TAUGHT = 24  # pictures of each prompt
BATCH = 8
SETTINGS = ({"num_inference_steps": 16}, {"num_inference_steps": 8}, {"num_inference_steps": 16, "temperature": 1.0})
NEVER = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the JSON here")
    parser.add_argument("--steps", type=int, default=450, help="of teaching")
    parser.add_argument("--pictures", type=int, default=4, help="of each prompt, to compare")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    emoji = ms.ImagePipeline.from_pretrained("emoji")
    emoji.set_progress_bar_config(disable=True)
    model, taught = teach(emoji, arguments.steps)
    pipe = ms.ImagePipeline(model, emoji.codec, emoji.text_encoder, emoji.scheduler)
    pipe.set_progress_bar_config(disable=True)
    report: dict[str, Any] = {"command": " ".join(sys.argv), "device": describe(torch.device("cpu")), "taught": taught}
    report["measured"] = [compare(pipe, arguments.pictures, settings) for settings in SETTINGS]
    publish(report, arguments.out)


def teach(emoji: Any, steps: int) -> tuple[TokenTransformer, dict[str, Any]]:
    """A masked model of what `emoji` draws, and how well it learnt."""
    torch.manual_seed(0)
    tokens = torch.cat([draw(emoji, number, TAUGHT) for number in range(len(PROMPTS))])
    with torch.no_grad():
        texts = emoji.text_encoder.encode(list(PROMPTS)).repeat_interleave(TAUGHT, dim=0)
        nothing = emoji.text_encoder.encode([""])[0]
    same = ("vocab_size", "grid", "text_dim", "learned_positions")
    model = TokenTransformer(
        kind="masked",
        **{name: emoji.transformer.config[name] for name in same},
        dim=128,
        num_heads=2,
        ffn_dim=320,
        num_layers=6,
        num_cross_layers=0,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    loss = torch.zeros(())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50, 2 - 2 * step / steps)
        rows = torch.randint(len(tokens), (BATCH,))
        text = torch.where(torch.rand(BATCH, 1, 1) < 0.1, nothing, texts[rows])  # for guidance
        known = torch.rand(BATCH, tokens.shape[1]) >= torch.cos(torch.rand(BATCH, 1) * math.pi / 2)
        loss = F.cross_entropy(model(tokens[rows], text, known=known)[~known], tokens[rows][~known])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), {"steps": steps, "loss": float(loss.detach())}


def draw(pipe: Any, number: int, count: int, **settings: Any) -> Tensor:
    """Tokens [count, N] of a prompt, from its own seed."""
    generator = torch.Generator().manual_seed(number)
    given = {"num_images_per_prompt": count, "generator": generator, "output_type": "latent", **settings}
    return pipe(PROMPTS[number], **given).images


@torch.no_grad()
def compare(pipe: Any, count: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Every refresh against 1."""
    measured: dict[str, Any] = {"settings": settings}
    exact = torch.zeros(0)
    for refresh in (1, 2, 4, NEVER):
        start = time.process_time()
        tokens = torch.cat(
            [draw(pipe, number, count, order="masked", refresh=refresh, **settings) for number in range(len(PROMPTS))]
        )
        seconds = time.process_time() - start
        exact = tokens if refresh == 1 else exact
        apart = (pipe.codec.decode(tokens) - pipe.codec.decode(exact)).square().mean(dim=(1, 2, 3)).sqrt()
        measured["never" if refresh == NEVER else str(refresh)] = {
            "seconds_a_picture": round(seconds / len(tokens), 3),
            "pictures_changed": round(float((tokens != exact).any(dim=1).float().mean()), 3),
            "tokens_changed": round(float((tokens != exact).float().mean()), 4),
            "apart_mean": round(float(apart.mean()), 4),  # root mean square over pixels in [0, 1]
            "apart_most": round(float(apart.max()), 4),
        }
    neighbours = exact.unflatten(0, (len(PROMPTS), count))
    measured["tokens_that_differ_in_another_picture_of_the_prompt"] = round(
        float((neighbours != neighbours.roll(1, dims=1)).float().mean()), 3
    )
    return measured


if __name__ == "__main__":
    main()
