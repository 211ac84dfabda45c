"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything has a value that suits one person at home; `millstream serve` turns what needs turning.

    Attributes:
        model, recipe, preset: names for the page to show.
        host: what the server listens on; on anything but this machine's own address a token is required.
        token: what a client must know; None asks for nothing.
        origins: pages of other hosts that may connect, such as "https://example.org"; the server's own always may.
        max_sessions: viewers that share the model; more wait in a queue.
        max_waiting: viewers that may wait; more are refused.
        idle_seconds: a session that nobody touches for this long gives its place up.
        grace_seconds: how long a session whose socket broke waits for its viewer to come back.
        hello_seconds, silence_seconds: a socket that says nothing for this long is closed.
        history_seconds, history_bytes: how far `back` reaches, and the memory it may take per session.
        max_branches: branches per session.
        recordings: folder that keeps recordings; None is a temporary one that goes with the server.
        recording_bytes: what the recordings of one session may take; of all together `max_sessions` times two.
        connects: sockets that one address may open at once, and the same again every minute.
    """

    model: str = ""
    recipe: str = ""
    preset: str = ""
    host: str = "127.0.0.1"
    token: str | None = None
    origins: tuple[str, ...] = ()
    max_sessions: int = 4
    max_waiting: int = 50
    idle_seconds: float = 600.0
    grace_seconds: float = 30.0
    hello_seconds: float = 5.0
    silence_seconds: float = 30.0
    history_seconds: float = 10.0
    history_bytes: int = 512 * 2**20
    max_branches: int = 8
    recordings: Path | None = None
    recording_bytes: int = 512 * 2**20
    connects: int = 120
