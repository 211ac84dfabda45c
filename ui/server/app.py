"""The whole server as one ASGI app: the page at /, sockets at /live and /sound, recordings, health and numbers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from .contract import Servable, Vault
from .protocol import PROTOCOL, Close
from .security import Doorman, Gate, check_exposure, headers_of, host_allowed, origin_allowed, token_given
from .sessions import Sessions
from .settings import Settings
from .speaking import speech_sessions
from .status import memory_mb

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.websockets import WebSocket

    from ...pipelines.audio import AudioPipeline
    from ..page import PageSettings

PLACEHOLDER = "<!doctype html><title>millstream</title><p>millstream is running; its socket is at /live.</p>"


def create_app(
    pipe: Servable,
    settings: Settings | None = None,
    *,
    page: PageSettings | None = None,
    vault: Vault | None = None,
    speech: AudioPipeline | None = None,
) -> FastAPI:
    """Everything that `millstream serve` serves, for any ASGI server.

    Args:
        pipe: draws for all viewers; see `Servable`.
        settings: who may come in, and limits.
        page: what the page at / shows and may call; None leaves it out, for clients that bring their own.
        vault: keeps the last moment of every session for other servers; see `Vault`.
        speech: speaks for all viewers, on a socket of its own at /sound; None for a server that does not speak.

    Returns:
        The app; `app.state.sessions` is its `Sessions`, `speech` those that speak, or None, and `rooms` all there are.

    Raises:
        ValueError: the settings open the server to the network without a token.
        ImportError: gradio, which brings FastAPI, isn't installed.
    """
    try:
        from fastapi import FastAPI
    except ImportError:
        raise ImportError("the server needs FastAPI, which comes with Gradio: pip install gradio") from None
    settings = settings or Settings()
    check_exposure(settings.host, settings.token)
    sessions = Sessions(pipe, settings, vault)
    speaking = None if speech is None else speech_sessions(speech, settings)
    rooms = [room for room in (sessions, speaking) if room is not None]
    pool = ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2)), thread_name_prefix="millstream-pictures")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        _one_thread_per_picture()
        for room in rooms:
            await room.open()
        yield
        for room in rooms:
            await room.close()
        pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="millstream", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.sessions, app.state.speech, app.state.rooms = sessions, speaking, rooms
    _add_routes(app, sessions, speaking, pool)
    if page is None:
        _add_placeholder(app)
    else:
        from ..page import mount_page

        app = mount_page(app, page)
    app.add_middleware(Gate, settings=settings)
    return app


def _one_thread_per_picture() -> None:
    """OpenCV's own threads would fight with the pool's and the model's for the same cores."""
    import cv2

    cv2.setNumThreads(1)


def _add_routes(app: FastAPI, sessions: Sessions, speaking: Sessions | None, pool: ThreadPoolExecutor) -> None:
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route, WebSocketRoute

    doorman = Doorman(sessions.settings.connects)

    async def health(request: Request) -> Response:
        drawing = sessions.engine.alive
        return JSONResponse({"ok": drawing, "protocol": PROTOCOL}, 200 if drawing else 503)

    async def metrics(request: Request) -> Response:
        numbers = {**sessions.numbers(), "memory_mb": memory_mb(), "process": os.getpid()}
        return JSONResponse(numbers if speaking is None else {**numbers, "speech": speaking.numbers()})

    async def recording(request: Request) -> Response:
        key = request.query_params.get("key") or request.cookies.get("millstream_session", "")
        seat = sessions.find(key)  # a client may know its session by the name of a branch
        path = sessions.recordings.fetch(request.path_params["id"], seat.secret if seat else key)
        if path is None:
            return PlainTextResponse("there is no such recording, or the key of its session is missing\n", 404)
        headers = {"cache-control": "private, no-store", "referrer-policy": "no-referrer"}
        return FileResponse(path, media_type="video/mp4", filename="millstream.mp4", headers=headers)

    async def live(websocket: WebSocket) -> None:
        await _serve_socket(websocket, sessions, pool, doorman)

    async def sound(websocket: WebSocket) -> None:
        assert speaking is not None
        await _serve_socket(websocket, speaking, pool, doorman)

    app.router.routes += [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/recordings/{id}.mp4", recording),
        WebSocketRoute("/live", live),
        *([] if speaking is None else [WebSocketRoute("/sound", sound)]),
    ]


async def _serve_socket(websocket: WebSocket, sessions: Sessions, pool: ThreadPoolExecutor, doorman: Doorman) -> None:
    """Refuse at the door, in words the browser can read (before accepting it would only see that it failed)."""
    from .socket import Connection

    settings, headers = sessions.settings, headers_of(websocket.scope)
    await websocket.accept()
    address = websocket.client.host if websocket.client else ""
    refusal = None
    if not doorman.admits(address):
        refusal = Close.TOO_MANY
    elif not host_allowed(headers, settings) or not origin_allowed(headers, settings):
        refusal = Close.ORIGIN
    if refusal is not None:
        await websocket.close(int(refusal))
        return
    await Connection(websocket, sessions, pool, trusted=token_given(websocket.scope, settings)).run()


def _add_placeholder(app: FastAPI) -> None:
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    app.router.routes.append(Route("/", lambda request: HTMLResponse(PLACEHOLDER)))
