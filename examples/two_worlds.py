"""Fork a walk: one future turns left, the other right, side by side in two_worlds.mp4.

python examples/two_worlds.py
"""

from __future__ import annotations

from dataclasses import replace

import torch

import millstream as ms
from millstream.streaming import step_together


def main() -> None:
    pipe = ms.WorldPipeline.from_pretrained("freedoom")
    left = pipe.stream("a brick corridor with soldiers", generator=torch.Generator().manual_seed(1))
    left.steer(keys={"KeyW"})
    for _ in range(20):
        left.step()
    right = left.fork()
    left.steer(keys={"ArrowLeft"})
    right.steer(keys={"ArrowRight"})
    with ms.Recorder("two_worlds.mp4", rate=pipe.rate, scale=4) as recorder:
        for _ in range(60):
            # One call draws both, in one batch; each is what it would have been alone.
            for pair in zip(*step_together([left, right]), strict=True):
                recorder.write(replace(pair[0], data=torch.cat([chunk.data for chunk in pair], dim=-1)))
    print(f"two_worlds.mp4: {recorder.frames} frames")


if __name__ == "__main__":
    main()
