"""Walk through the world that ships, change world on the way, and write walk.mp4.

python examples/walk.py
"""

from __future__ import annotations

import torch

import millstream as ms

FRAMES = 140  # 8 seconds


def main() -> None:
    pipe = ms.WorldPipeline.from_pretrained("freedoom")
    with (
        pipe.stream("a brick corridor with soldiers", generator=torch.Generator().manual_seed(0)) as session,
        ms.Recorder("walk.mp4", rate=pipe.rate, scale=4) as recorder,
    ):
        session.steer(keys={"KeyW"})
        for index, chunk in zip(range(FRAMES), session.chunks(), strict=False):
            recorder.write(chunk)
            turning = {"ArrowLeft"} if index % 40 > 28 else set()
            session.steer(keys={"KeyW"} | turning)
            if index == FRAMES // 2:
                session.steer(prompt="a green slime arena with medkits")
        print(f"walk.mp4: {recorder.frames} frames, drawn at {session.metrics.fps:.1f} frames/s")


if __name__ == "__main__":
    main()
