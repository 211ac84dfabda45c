"""The same app on Ray Serve: several replicas, each with its own copy of the model, behind one address.

A socket stays on its replica. The browser's cookies choose the replica (consistent hashing), so the page, its Gradio
queue and its sockets meet again. Every replica sends the last moment of each session to one actor, `Keeper`; when a
replica dies, its viewers reconnect with their secrets, and whichever replica they reach goes on from there.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .contract import Servable
from .keeper import Keeper, RayVault
from .settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

NAME = "millstream"
KEEPER = "millstream-keeper"
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
PLACE_COOKIE = "millstream_place"
SPARE_REQUESTS = 64  # besides sockets: pages, their statics, Gradio's event streams
FULLNESS = 0.75  # share of its places that a replica is meant to fill before another is started


def import_ray() -> tuple[Any, Any]:
    """Ray and Ray Serve.

    Raises:
        ImportError: they aren't installed, with the extra that brings them.
    """
    try:
        import ray
        from ray import serve
    except ImportError:
        raise ImportError('--ray needs Ray Serve: pip install "millstream[ray]"') from None
    return ray, serve


class Place:
    """ASGI middleware: gives a browser the cookie by which it comes back to the same replica."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/" or _has_place(scope):
            return await self.app(scope, receive, send)
        cookie = f"{PLACE_COOKIE}={secrets.token_urlsafe(12)}; Path=/; HttpOnly; SameSite=Lax"

        async def send_with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"set-cookie", cookie.encode())]}
            await send(message)

        await self.app(scope, receive, send_with_cookie)


def _has_place(scope: Scope) -> bool:
    return any(name == b"cookie" and PLACE_COOKIE.encode() in value for name, value in scope["headers"])


def app_builder(load: Callable[[], Servable], settings: Settings, with_page: bool) -> Callable[[], FastAPI]:
    """What every replica runs to get its app: it loads the model there, not here."""

    def build() -> FastAPI:
        import ray
        from ray.exceptions import RayError

        from .app import create_app

        pipe = load()
        page = None
        if with_page:
            from ..page import PageSettings

            page = PageSettings(model=settings.model, recipe=settings.recipe, pipeline=lambda: pipe)
        vault = RayVault(ray.get_actor(KEEPER, namespace=NAME), ray.get, RayError)
        # recordings lie in a folder per replica, or two would take each other's for their own
        own = settings.recordings and settings.recordings / vault.owner
        if own:
            own.mkdir(parents=True)
        app = create_app(pipe, replace(settings, recordings=own), page=page, vault=vault)
        app.add_middleware(Place)
        return app

    return build


def start(
    load: Callable[[], Servable],
    settings: Settings,
    *,
    port: int,
    replicas: tuple[int, int],
    gpus: float = 0.0,
    cpus: float = 1.0,
    with_page: bool = True,
) -> None:
    """Start the replicas and the proxy; returns when they serve. `stop` ends them.

    Args:
        load: gives the pipeline; runs in each replica.
        settings: of each replica; `max_sessions` is what one replica holds.
        port: where the proxy listens, on `settings.host`.
        replicas: (least, most). Between them their number follows the number of sessions.
        gpus, cpus: what each replica needs.
        with_page: mount the Gradio page at /.

    Raises:
        ImportError: Ray Serve is missing.
        ValueError: `replicas` is no range, or none could start, for example because the model doesn't load.
    """
    least, most = replicas
    if not 1 <= least <= most:
        raise ValueError(f"replicas must be a range such as (1, 4), got {replicas}")
    os.environ.setdefault("RAY_SERVE_SESSION_ID_HEADER_KEY", "cookie")  # read by Ray's processes when they start
    ray, serve = import_ray()
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    # detached, because handles got by name don't keep an actor alive
    lasting = {"lifetime": "detached", "max_restarts": -1, "get_if_exists": True}
    keeper = ray.remote(Keeper).options(name=KEEPER, namespace=NAME, num_cpus=0, **lasting)
    ray.get(keeper.remote(settings.grace_seconds).numbers.remote())
    serve.start(http_options={"host": settings.host, "port": port}, proxy_location="EveryNode")
    scaling = AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        target_ongoing_requests=max(1.0, FULLNESS * settings.max_sessions),  # a socket is a request that goes on
        upscale_delay_s=5,
        downscale_delay_s=600,  # a replica that goes takes its recordings with it
    )
    deployment = serve.deployment(
        serve.ingress(app_builder(load, settings, with_page))(),
        name="Live",
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=settings.max_sessions + settings.max_waiting + SPARE_REQUESTS,
        autoscaling_config=scaling,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),  # pyright: ignore[reportArgumentType]
        health_check_period_s=2,
        graceful_shutdown_timeout_s=10,
        max_constructor_retry_count=2,
        logging_config={"enable_access_log": False},  # it would write tokens and keys into the log
    )
    try:
        serve.run(deployment.bind(), name=NAME, route_prefix="/", blocking=False)
    except RuntimeError as error:
        raise ValueError(f"no replica could start, does the model load? ({error})") from error


def stop() -> None:
    """End the replicas, the keeper and, where `start` began it, Ray."""
    ray, serve = import_ray()
    serve.shutdown()
    with suppress(ValueError):  # it never came up
        ray.kill(ray.get_actor(KEEPER, namespace=NAME))
    ray.shutdown()
