"""Your webcam as a Freedoom world, in a window, more of it where you hold still.

python examples/webcam.py [VIDEO]

Without a camera, give it a video, which is played as if it were one.
"""

from __future__ import annotations

import sys

import millstream as ms


def main() -> None:
    pipe = ms.WorldPipeline.from_pretrained("freedoom")
    source = ms.VideoFile(sys.argv[1], loop=True) if len(sys.argv) > 1 else ms.Camera(0)
    with pipe.stream("a brick corridor with soldiers", strength=0.5, follow_motion=0.4) as session:
        print(ms.live(source, session, ms.Window()).status())


if __name__ == "__main__":
    main()
