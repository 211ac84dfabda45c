"""A picture from words, step by step, then a part of it drawn anew.

python examples/picture.py [WORDS]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from PIL import Image

import millstream as ms


def main() -> None:
    words = " ".join(sys.argv[1:]) or "a red apple"
    pipe = ms.ImagePipeline.from_pretrained("emoji")
    generator = torch.Generator().manual_seed(0)
    for step in pipe.stream(words, generator=generator):
        print(f"step {step.step + 1} of {step.n_steps}: {int(step.known.sum())} tokens decided")
        if step.step + 1 == step.n_steps:
            array = (step.preview()[0].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
            Image.fromarray(array).resize((256, 256)).save("picture.png")
    hole = Image.new("L", (pipe.size, pipe.size))
    hole.paste(255, (0, 0, pipe.size, pipe.size // 2))  # white where to paint: the upper half
    again: Any = pipe(words, image=Image.open("picture.png"), mask_image=hole)
    again.images[0].save("picture-again.png")


if __name__ == "__main__":
    main()
