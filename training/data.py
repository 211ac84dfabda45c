"""Recipe of the data: random play in real games, written as shards.

millstream train data --out data/freedoom --shards 48 --frames 20000
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .environments import collect


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="millstream train data", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards; finished ones are kept")
    parser.add_argument("--shards", type=int, default=48, help="shard i plays world i modulo 8")
    parser.add_argument("--frames", type=int, default=20_000, help="frames per shard (37 kB each)")
    parser.add_argument("--processes", type=int, help="workers, each with a shard in memory; one per core by default")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives episodes that training never saw")
    parser.add_argument("--env", help='a Gymnasium environment ("module:Name-v0") instead of the Doom worlds')
    arguments = parser.parse_args(argv)
    collect(
        arguments.out,
        frames_per_shard=arguments.frames,
        shards=arguments.shards,
        processes=arguments.processes,
        seed=arguments.seed,
        env=arguments.env,
    )


if __name__ == "__main__":
    main()
