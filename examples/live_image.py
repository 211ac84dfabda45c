"""Your webcam redrawn by a diffusers model, in a window: type a new prompt and press Enter.

python examples/live_image.py stabilityai/sd-turbo [VIDEO]

The model may be a folder. Without a camera, give it a video, which is played as if it were one.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from diffusers import DiffusionPipeline

import millstream as ms


def main() -> None:
    cuda = torch.cuda.is_available()
    loaded: Any = DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float16 if cuda else torch.float32)
    live = ms.LiveImagePipeline.from_diffusers(loaded.to("cuda" if cuda else "cpu"), overlap=cuda)
    live.warmup()
    source = ms.VideoFile(sys.argv[2], loop=True) if len(sys.argv) > 2 else ms.Camera(0)
    with live.stream("an oil painting of a fox", strength=0.5, skip_similar=0.98) as session:

        def listen() -> None:
            for line in sys.stdin:
                session.steer(prompt=line.strip())

        threading.Thread(target=listen, daemon=True).start()
        print(ms.live(source, session, ms.Window()).status())


if __name__ == "__main__":
    main()
