"""What two and four players of one model cost, against one, through the live server; as JSON.

python benchmarks/serve_worlds.py                    the world that ships, on the GPU if there is one
python benchmarks/serve_worlds.py MODEL --seconds 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from typing import Any

from serve import VIDEO_HEADER, Client, served


async def worlds(address: str, seconds: float) -> dict[str, Any]:
    """One player, then two, then four; each round's step time and frames per second, and its cost against one."""
    rounds: dict[str, Any] = {}
    for players in (1, 2, 4):
        seen = await asyncio.gather(*(watch(address, seconds) for _ in range(players)))
        steps = statistics.median(status["step_ms"]["p50"] for status in seen)
        fps = statistics.median(status["fps"] for status in seen)
        rounds[str(players)] = {"step_ms": steps, "fps": fps}
    for round in rounds.values():
        round["cost"] = round["step_ms"] / rounds["1"]["step_ms"]
    return {"players": rounds, "bar": {"four_cost_at_most_2.2": rounds["4"]["cost"] <= 2.2}}


async def watch(address: str, seconds: float) -> dict[str, Any]:
    """Play for so long; the last status."""
    from websockets.asyncio.client import connect

    async with connect(address, max_size=None, compression=None, proxy=None) as socket:
        client = Client(socket)
        await client.hello()
        end = time.monotonic() + seconds
        while time.monotonic() < end or not client.status:
            message = await socket.recv()
            if isinstance(message, str):
                said = json.loads(message)
                client.status = said if said["type"] == "status" else client.status
            else:
                await client.say("shown", frame=VIDEO_HEADER.unpack_from(message)[4], age=0)
        await client.say("leave")
        return client.status


def main() -> None:
    from millstream.ui.machine import machine, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="freedoom", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each round (default: 20)")
    arguments = parser.parse_args()
    with served(0.0, (0, 0), 4, arguments.model) as address:
        result = asyncio.run(worlds(address, arguments.seconds))
    json.dump({"machine": machine(), "versions": versions(), "result": result}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
