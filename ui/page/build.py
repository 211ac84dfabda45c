"""The Gradio side of the page: one piece of HTML that the modules in `static/` bring to life, and two forms."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .memory import memory_plan
from .narrow import Narrow
from .settings import PageSettings

if TYPE_CHECKING:
    import fastapi
    import gradio

log = logging.getLogger(__name__)
STATIC = Path(__file__).resolve().parent / "static"
STATIC_PATH = "/page"  # Gradio itself answers at /static and /assets
OLDEST_GRADIO = (6, 27)  # the first whose history of runs can be left out
QUEUED_CLIPS = 20
LOOK_SECONDS = 0.05
CACHE_SECONDS = (600, 3600)  # Gradio copies clips and uploads; every ten minutes those of an hour ago go

# The element exists before its modules do; they are fetched relative to the page, which may stand behind a proxy.
START = "import(new URL('page/main.js', document.baseURI)).then((page) => page.start(element, server))"
HEAD = """
<link rel="stylesheet" href="page/tokens.css">
<link rel="stylesheet" href="page/page.css">
<link rel="stylesheet" href="page/stage.css">
<link rel="stylesheet" href="page/generate.css">
<link rel="stylesheet" href="page/sound.css">
<link rel="modulepreload" href="page/main.js">
<link rel="icon" type="image/svg+xml" href="page/icon.svg">
<meta name="theme-color" media="(prefers-color-scheme: light)" content="#f7f8f6">
<meta name="theme-color" media="(prefers-color-scheme: dark)" content="#0e1312">
"""


def build_page(settings: PageSettings) -> gradio.Blocks:
    """The page as Gradio blocks. `mount_page` gives it its static files, its theme and its place.

    Raises:
        ImportError: Gradio is missing or older than 6.27.
    """
    gr = _gradio()
    from .generate import add_generate
    from .image import add_image

    with gr.Blocks(title="millstream", analytics_enabled=False, fill_width=True, delete_cache=CACHE_SECONDS) as page:
        gr.HTML(
            (STATIC / "page.html").read_text(encoding="utf-8").replace("SPEECH", "yes" if settings.speech else "no"),
            elem_id="ms-page",
            js_on_load=START,
            apply_default_css=False,
            server_functions=_server_functions(settings),
        )
        add_generate(gr, settings)
        add_image(gr, settings)
    page.queue(max_size=QUEUED_CLIPS, api_open=False)  # `api_open` would let calls go past the queue
    _slow_down(page)
    return page


def _slow_down(page: gradio.Blocks) -> None:
    """Let Gradio look for new clips 20 times a second, as it does on Windows, instead of a thousand times.

    Each look wakes the event loop, and with it the interpreter's lock, which the thread that draws then waits for.
    """
    if not hasattr(page._queue, "sleep_when_free"):
        log.warning("this Gradio has no sleep_when_free; its idle queue may slow the stream down")
        return
    page._queue.sleep_when_free = page._queue.progress_update_sleep_when_free = LOOK_SECONDS


def mount_page(app: fastapi.FastAPI, settings: PageSettings) -> fastapi.FastAPI:
    """Put the page at "/" and its static files at "/page" of `app`. Call it last: "/" takes all that is left."""
    gr = _gradio()
    from fastapi.staticfiles import StaticFiles

    from .uploads import MAX_BYTES

    app.mount(STATIC_PATH, StaticFiles(directory=STATIC), name="page")
    app.add_middleware(Narrow, folder=Path(gr.utils.get_upload_folder()))
    return gr.mount_gradio_app(
        app,
        build_page(settings),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        show_error=True,
        max_file_size=MAX_BYTES,
        theme=gr.themes.Base(font=["Page Sans", "system-ui", "sans-serif"], font_mono=["monospace"]),
        head=HEAD,
    )


def _server_functions(settings: PageSettings) -> list[Any]:
    """What the page's script may call in Python, each with the one argument that Gradio passes on."""

    served = [settings.model, settings.recipe, settings.preset]

    def models(_: object) -> dict[str, Any]:
        """What the picker offers, and what is served now."""
        return {
            **dict(zip(("model", "recipe", "preset"), served)),
            "models": list(settings.models),
            "recipes": list(settings.recipes),
            "presets": list(settings.presets),
            "can_load": settings.load is not None,
        }

    def plan(choice: object) -> dict[str, Any]:
        """The memory plan, and the command that serves this choice."""
        model, recipe, preset = _offered(settings, choice)
        words = ["millstream", "serve", "--model", model]
        for option, value in (("--recipe", recipe), ("--preset", preset)):
            words += [option, value] if value else []
        return memory_plan(model, recipe, preset).as_json() | {"command": shlex.join(words)}

    def load(choice: object) -> dict[str, str]:
        """Swap the served model; "error" says why not."""
        model, recipe, preset = _offered(settings, choice)
        if settings.load is None:
            return {"error": "this server does not change its model"}
        try:
            settings.load(model, recipe, preset)
        except (ValueError, OSError, ImportError) as error:
            return {"error": str(error)}
        served[:] = model, recipe, preset
        return {"model": model}

    return [models, plan, load]


def _offered(settings: PageSettings, choice: object) -> tuple[str, str, str]:
    """Model, recipe and preset as a browser sent them. A name can be a path, so only what was offered passes."""
    offers = {
        "model": settings.models,
        "recipe": ("", settings.recipe, *settings.recipes),
        "preset": ("", settings.preset, *settings.presets),
    }
    if not isinstance(choice, list) or len(choice) != len(offers):
        raise ValueError("a choice is a list of model, recipe and preset")
    for (what, offered), value in zip(offers.items(), choice):
        if value not in offered:
            raise ValueError(f"this server offers no such {what}")
    model, recipe, preset = choice
    return model, recipe, preset


def _gradio() -> Any:
    try:
        import gradio as gr
    except ImportError:
        raise ImportError('the page needs Gradio: pip install "gradio>=6.27"') from None
    if tuple(int(part) for part in gr.__version__.split(".")[:2]) < OLDEST_GRADIO:
        raise ImportError(f"the page needs Gradio 6.27 or newer, found {gr.__version__}: pip install -U gradio")
    return gr
