"""Of Gradio's many routes, those that the page and `gradio_client` use; and no request body larger than they need.

Gradio also fetches addresses for whoever asks (`/file=http...`, `/proxy=`), cuts videos with FFmpeg, and runs functions
past its queue. None of that is wanted here, and it would answer to anybody whom the gate lets in.
"""

from __future__ import annotations

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


class TooLarge(Exception):
    """A body has grown over its limit while it was read."""


class Narrow:
    """ASGI middleware: 404 for routes of Gradio that nobody needs, 413 for bodies over the limit.

    A body is counted while it comes, since its length may be told wrongly or not at all.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        from starlette.responses import PlainTextResponse

        if not is_open(scope["path"]):
            return await PlainTextResponse("not served here\n", 404)(scope, receive, send)
        limit = UPLOAD_BYTES if scope["path"].rstrip("/") == f"{API}/upload" else WORDS_BYTES
        too_large = PlainTextResponse(f"at most {limit:,} bytes may be sent here\n", 413)
        if told_length(scope) > limit:
            return await too_large(scope, receive, send)
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

        try:
            await self.app(scope, counted, noted)
        except TooLarge:
            if not begun:
                await too_large(scope, receive, send)


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
