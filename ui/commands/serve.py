"""`millstream serve`: the page, the socket and the model behind one address."""

from __future__ import annotations

import argparse
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from ..speech import MODEL as SPEECH
from ..speech import has_speech, load_speech
from ..video import add_video_options, is_video_model, load_video
from ..world import load_world, pick_device, positive_integer, positive_seconds
from .image import image_loader

if TYPE_CHECKING:
    import uvicorn

    from ..server.contract import Servable
    from ..server.settings import Settings

MODEL = "freedoom"
PORT = 7860
MESSAGE_BYTES = 4 * 2**20  # above every limit of the protocol, which answers with a reason; this one just hangs up


def add(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "serve",
        help="open the live page in the browser: play, camera, generate",
        description="Serves a page to this machine. Others come in only with --host and --token; see docs/serving.md",
    )
    parser.add_argument(
        "--model",
        action="append",
        dest="models",
        help="a shipped model or a model's folder (default: freedoom); given again, the page can change to that one",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    parser.add_argument("--port", type=port_number, default=PORT, help="default: %(default)s; 0 takes any free one")
    parser.add_argument("--token", nargs="?", const="", help="ask for this token; without a value a new one is printed")
    parser.add_argument(
        "--origin", action="append", default=[], metavar="URL", help="a page of another host that may connect, too"
    )
    parser.add_argument("--max-sessions", type=positive_integer, default=4, help="viewers at once (default: 4)")
    parser.add_argument(
        "--idle", type=positive_seconds, default=600.0, metavar="SECONDS", help="untouched sessions end (default: 600)"
    )
    parser.add_argument("--recordings", type=Path, metavar="DIR", help="keep recordings here (default: not kept)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--ray", action="store_true", help="serve from several replicas of the model with Ray Serve")
    parser.add_argument(
        "--replicas",
        type=replica_range,
        default=(1, 1),
        metavar="N or MIN-MAX",
        help="replicas of --ray, each with a GPU of its own if there is one; a range follows the number of viewers",
    )
    add_video_options(parser)
    parser.set_defaults(run=run)


def replica_range(text: str) -> tuple[int, int]:
    """For `argparse`: "2" or "1-4"."""
    least, _, most = text.partition("-")
    if not (least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least)):
        raise argparse.ArgumentTypeError(f"must be a number such as 2 or a range such as 1-4, got {text!r}")
    return int(least), int(most or least)


def port_number(text: str) -> int:
    """For `argparse`: a TCP port."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to 65535, got {text!r}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Everything that can be refused is refused before the model is loaded."""
    settings = settings_from(arguments)
    if arguments.ray:
        if len(arguments.models or ()) > 1:
            raise ValueError("--ray serves one model; give --model once")
        return run_on_ray(arguments, settings)
    listener = listen(settings.host, arguments.port)
    try:
        from ...pipelines.presets import PRESETS
        from ...pipelines.recipes import RECIPES
        from ..page import PageSettings
        from ..server.app import create_app
        from ..server.swap import Swap

        def load(model: str, recipe: str, preset: str) -> Servable:
            return load_pipeline(arguments, model, recipe, preset)

        models = tuple(dict.fromkeys(arguments.models or [MODEL]))
        videos = any(is_video_model(chosen(arguments, model, settings.recipe, "")) for model in models)
        page = PageSettings(
            model=settings.model,
            models=models,
            recipe=settings.recipe,
            recipes=tuple(RECIPES) if videos else (),
            preset=settings.preset,
            presets=tuple(PRESETS),
            pipeline=lambda: app.state.sessions.pipe,
            load=Swap(lambda: app.state.sessions, load),
            image=image_loader(arguments.device),
            speech=has_speech(),
        )
        pipe = load(settings.model, settings.recipe, settings.preset)
        speech = load_speech(SPEECH, arguments.device) if has_speech() else None
        app = create_app(pipe, settings, page=page, speech=speech)
        address = address_of(settings, listener.getsockname()[1])
        print_welcome(settings, address)
        make_server(app, address if arguments.open else None).run(sockets=[listener])
    finally:
        listener.close()
    return 0


def chosen(arguments: argparse.Namespace, model: str, recipe: str, preset: str) -> argparse.Namespace:
    """The arguments as if this choice had been typed. Weights that were named beside the first model are its own."""
    own = {"model": model, "recipe": recipe or None, "preset": preset or None}
    if model != (arguments.models or [MODEL])[0]:
        own |= {"checkpoint": None, "lora": None, "decoder": None}
    return argparse.Namespace(**{**vars(arguments), **own})


def load_pipeline(arguments: argparse.Namespace, model: str, recipe: str, preset: str) -> Servable:
    """A world or a video model.

    Raises:
        FileNotFoundError, ValueError: no such model, recipe, preset or device, or weights that don't fit.
    """
    choice = chosen(arguments, model, recipe, preset)
    if is_video_model(choice):
        return load_video(choice)
    return load_world(model, arguments.device, choice.preset)


def run_on_ray(arguments: argparse.Namespace, settings: Settings) -> int:
    """The same app from several replicas; the model is loaded in each of them."""
    import time
    import webbrowser

    from ..server import ray_serve

    ray_serve.import_ray()
    with listen(settings.host, arguments.port) as listener:  # Ray would say it in a hundred lines
        port = listener.getsockname()[1]
    gpus = 1.0 if pick_device(arguments.device).type == "cuda" else 0.0
    try:
        ray_serve.start(
            lambda: load_pipeline(arguments, settings.model, settings.recipe, settings.preset),
            settings,
            port=port,
            replicas=arguments.replicas,
            gpus=gpus,
        )
        address = address_of(settings, port)
        print_welcome(settings, address)
        if arguments.open:
            webbrowser.open(address)
        while True:
            time.sleep(1)
    finally:
        ray_serve.stop()


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The command line as settings.

    Raises:
        ValueError: an address for others without a token, a token that can be guessed, an unknown recipe or preset.
        OSError: the folder for recordings can't be written.
    """
    from ...pipelines.presets import find_preset
    from ...pipelines.recipes import find_recipe
    from ..server.security import check_exposure
    from ..server.settings import Settings

    if arguments.recipe is not None:
        find_recipe(arguments.recipe)
    if arguments.preset is not None:
        find_preset(arguments.preset)
    token = secrets.token_urlsafe(16) if arguments.token == "" else arguments.token
    check_exposure(arguments.host, token)
    for origin in arguments.origin:
        check_origin(origin)
    if arguments.recordings is not None:
        arguments.recordings.mkdir(parents=True, exist_ok=True)
    return Settings(
        model=(arguments.models or [MODEL])[0],
        recipe=arguments.recipe or "",
        preset=arguments.preset or "",
        host=arguments.host,
        token=token,
        origins=tuple(arguments.origin),
        max_sessions=arguments.max_sessions,
        idle_seconds=arguments.idle,
        recordings=arguments.recordings,
    )


def check_origin(origin: str) -> None:
    """An origin is scheme and host, as browsers send it.

    Raises:
        ValueError: it is something else.
    """
    from urllib.parse import urlsplit

    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
        raise ValueError(f"--origin is a scheme and a host such as https://example.org, got {origin!r}")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before anything slow happens.

    Raises:
        OSError: no such address, the port is taken, or it needs rights.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise OSError(f"there is no address {host!r}; use 127.0.0.1 for this machine or 0.0.0.0 for all") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except PermissionError:
        listener.close()
        raise OSError(f"port {port} needs administrator rights; use one from 1024") from None
    except OSError as error:
        listener.close()
        if error.errno in (getattr(socket, "EADDRINUSE", 98), 98, 48, 10048):
            raise OSError(f"port {port} is in use; use --port {port + 1}, or --port 0 for any free one") from None
        raise OSError(f"this machine can't listen on {host}: {error.strerror}") from None
    return listener


def address_of(settings: Settings, port: int) -> str:
    """Where a browser on this machine finds the page."""
    host = {"0.0.0.0": "localhost", "127.0.0.1": "localhost", "::": "localhost"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    token = f"?token={settings.token}" if settings.token else ""
    return f"http://{host}:{port}/{token}"


def print_welcome(settings: Settings, address: str) -> None:
    """Where to go; the token is printed here and nowhere else."""
    from ..server.security import is_loopback

    print(f"{settings.model}: {address}", flush=True)
    if not is_loopback(settings.host):
        print(
            "others on the network can come in with the token; browsers give a camera to HTTPS pages only", flush=True
        )
    print("Ctrl-C ends the server", flush=True)


def make_server(app, open_address: str | None) -> uvicorn.Server:
    """Uvicorn, that says goodbye to every client and finishes every recording before it goes."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            if open_address is not None:
                import webbrowser

                webbrowser.open(open_address)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for sessions in app.state.rooms:
                await sessions.close()
            await super().shutdown(sockets=sockets)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # it would write tokens and keys into the log
        server_header=False,
        ws_max_size=MESSAGE_BYTES,
        ws_per_message_deflate=False,  # pictures are compressed already
        timeout_graceful_shutdown=5,
        timeout_keep_alive=20,
        proxy_headers=True,  # of a proxy on this machine; others' are not believed
    )
    return Server(config)
