"""The live loop in a window, in a dozen lines: `millstream play` with W, A, S, D, arrows and space, and nothing else.

python examples/window.py
"""

from __future__ import annotations

import millstream as ms


class Steering(ms.Window):
    """A window that tells its session which keys are down whenever a frame is shown."""

    def __init__(self, session: ms.Session, valid: set[str]) -> None:
        super().__init__()
        self.session = session
        self.valid = valid

    def write(self, chunk: ms.Chunk) -> None:
        super().write(chunk)
        self.session.steer(keys=self.keys & self.valid)


def main() -> None:
    pipe = ms.WorldPipeline.from_pretrained("freedoom")
    with pipe.stream("a brick corridor with soldiers") as session:
        print(ms.live(None, session, Steering(session, set(pipe.key_map))).status())


if __name__ == "__main__":
    main()
