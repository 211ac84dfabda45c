"""Of Gradio's many routes, those that the page and `gradio_client` use; and no request body larger than they need.

Gradio also fetches addresses for whoever asks (`/file=http...`, `/proxy=`), cuts videos with FFmpeg, and runs functions
past its queue. None of that is wanted here, and it would answer to anybody whom the gate lets in.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .uploads import MAX_BYTES

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

API = "/gradio_api"
OPEN = ("app_id", "cancel", "component_server", "heartbeat", "info", "queue", "reset", "startup-events", "upload")
OPEN_BELOW = ("call/", "heartbeat/", "queue/")
FILE = "file="
WORDS_BYTES = 2**20  # of a request that is no upload
UPLOAD_BYTES = MAX_BYTES + WORDS_BYTES  # all files of one request
KEPT_BYTES = 2**30  # all uploads and clips that Gradio keeps for an hour


class TooLarge(Exception):
    """A body has grown over its limit while it was read."""


class Narrow:
    """ASGI middleware: 404 for routes of Gradio that nobody needs, 413 for bodies over the limit.

    A body is counted while it comes, since its length may be told wrongly or not at all. No upload is taken that could
    make the `folder` of uploads larger than `KEPT_BYTES` (507).
    """

    def __init__(self, app: ASGIApp, folder: Path | None = None) -> None:
        self.app, self.folder = app, folder
        self._coming = 0  # uploads that are being read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        from starlette.responses import PlainTextResponse

        if not is_open(scope["path"]):
            return await PlainTextResponse("not served here\n", 404)(scope, receive, send)
        uploading = scope["path"].rstrip("/") == f"{API}/upload"
        limit = UPLOAD_BYTES if uploading else WORDS_BYTES
        too_large = PlainTextResponse(f"at most {limit:,} bytes may be sent here\n", 413)
        if told_length(scope) > limit:
            return await too_large(scope, receive, send)
        if uploading and size_of(self.folder) + (self._coming + 1) * UPLOAD_BYTES > KEPT_BYTES:
            full = "this server keeps no more uploads now; those of an hour ago go by themselves\n"
            return await PlainTextResponse(full, 507)(scope, receive, send)
        taken, begun = 0, False

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > limit:
                raise TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        self._coming += uploading
        try:
            await self.app(scope, counted, noted)
        except TooLarge:
            if not begun:
                await too_large(scope, receive, send)
        finally:
            self._coming -= uploading


def size_of(folder: Path | None) -> int:
    """Bytes of all files in it; what goes meanwhile counts nothing."""
    total = 0
    for path in folder.rglob("*") if folder is not None else ():
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def is_open(path: str) -> bool:
    """Is this path either none of Gradio's interface, or a part of it that is used?"""
    if not path.startswith(f"{API}/"):
        return True
    name = path[len(API) + 1 :]
    if name.startswith(FILE):
        return "://" not in name and not name[len(FILE) :].startswith("//")
    return name.rstrip("/") in OPEN or name.startswith(OPEN_BELOW) or name == "upload_progress"


def told_length(scope: Scope) -> int:
    """What the request says its body has; 0 if it doesn't."""
    told = dict(scope["headers"]).get(b"content-length", b"")
    return int(told) if told.isdigit() and len(told) < 20 else 0
