"""A real server with a quick model, one headless Chromium for all tests, and a view of the page in it."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from millstream.streaming import Chunk, Frame, Leaves, Session, WorldControl
from millstream.streaming.kv_cache import Window
from millstream.ui.page import PageSettings
from millstream.ui.server.app import create_app
from millstream.ui.server.settings import Settings

CAMERA_RGB = (200, 60, 30)  # what the fake camera sees
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

HEIGHT, WIDTH = 48, 64
WORLDS = ["a brick corridor with soldiers", "a green slime arena with medkits", "a dark maze with red walls"]
KEYS = {
    "KeyW": "MOVE_FORWARD",
    "KeyS": "MOVE_BACKWARD",
    "KeyA": "MOVE_LEFT",
    "KeyD": "MOVE_RIGHT",
    "ArrowUp": "MOVE_FORWARD",
    "ArrowLeft": "TURN_LEFT",
    "ArrowRight": "TURN_RIGHT",
    "Space": "ATTACK",
}


@dataclass
class Count:
    frame: int


class Pictures:
    """A pipeline whose pictures a test can read, with the contract of a world's.

    The lower half: red is the prompt, green whether KeyW is down, blue whether ArrowLeft is down. The upper half:
    stripes that wander with every frame, or the camera's picture turned negative.
    """

    rate = 25.0
    size = (HEIGHT, WIDTH)
    device = torch.device("cpu")
    key_map = KEYS
    worlds = WORLDS
    window = Window(8)

    def __init__(self) -> None:
        self.controls: list[WorldControl] = []
        self.slow = 0.0

    def stream(self, prompt: str, *, generator=None, num_inference_steps=None, guidance_scale=1.0):
        control = WorldControl(prompt=prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        return Session(self, control, generator=generator)

    def nearest_world(self, prompt: str) -> tuple[str, float]:
        return (prompt, 1.0) if prompt in WORLDS else (WORLDS[0], 0.42)

    def check(self, control: WorldControl) -> None:
        unknown = sorted(control.keys - KEYS.keys())
        if unknown:
            raise ValueError(f"unknown key {', '.join(unknown)}")
        if not control.prompt.strip():
            raise ValueError("the prompt is empty; describe a world")

    def begin(self, control: WorldControl, *, generator=None) -> Count:
        return Count(0)

    def advance(
        self, states: Sequence[Count], controls: Sequence[WorldControl], media: Sequence[Frame | None]
    ) -> list[list[Chunk]]:
        if self.slow:
            time.sleep(self.slow)
        return [[self.draw(*job)] for job in zip(states, controls, media, strict=True)]

    def draw(self, state: Count, control: WorldControl, shown: Frame | None) -> Chunk:
        self.controls.append(control)
        x = torch.arange(WIDTH)
        stripes = ((x + 2 * state.frame) % 16 < 8).float() * 0.5 + 0.25
        picture = stripes.expand(3, HEIGHT, WIDTH).clone()
        if shown is not None:
            picture = 1 - shown.data
        told = (WORLDS.index(control.prompt) / 2 if control.prompt in WORLDS else 0.2, "KeyW", "ArrowLeft")
        lower = [held if isinstance(held, float) else float(held in control.keys) for held in told]
        picture[:, HEIGHT // 2 :] = torch.tensor(lower).view(3, 1, 1)
        when = time.monotonic() if shown is None else shown.time
        chunk = Chunk("video", picture[None], state.frame, self.rate, control.version, when)
        state.frame += 1
        return chunk

    def flush(self, state: Count) -> list[Chunk]:
        return []

    def save(self, state: Count) -> Leaves:
        return {"frame": state.frame}

    def load(self, leaves: Leaves) -> Count:
        return Count(int(leaves["frame"]))

    def end(self, state: Count) -> None:
        pass


class Step(NamedTuple):
    step: int
    n_steps: int
    preview: Callable[[], Any]


class Painter:
    """An image pipeline: grey until the last step, then as red as the prompt is long (10 a letter)."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.steps = 0  # drawn so far, of all prompts
        self.slow = 0.05

    def stream(self, prompt: str, *, num_images_per_prompt: int, num_inference_steps: int, **_: Any) -> Iterator[Step]:
        self.prompts.append(prompt)
        for step in range(num_inference_steps):
            time.sleep(self.slow)
            self.steps += 1
            last = step + 1 == num_inference_steps
            colour = torch.tensor([10 * len(prompt) / 255, 0, 0]) if last else torch.full((3,), 0.5)
            pictures = colour[:, None, None].expand(num_images_per_prompt, 3, 8, 8)
            yield Step(step, num_inference_steps, lambda pictures=pictures: pictures)


class Server:
    """`create_app` on a free port of this machine, in a thread."""

    def __init__(self, pipe: Any, settings: Settings, page: PageSettings, speech: Any = None) -> None:
        import uvicorn

        self.app = create_app(pipe, settings, page=page, speech=speech)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        config = uvicorn.Config(self.app, port=port, log_level="warning", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until(lambda: self._server.started)

    @property
    def sessions(self) -> Any:
        return self.app.state.sessions

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait for `condition` and return what it says; a test that waits in vain fails here."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds:g} seconds in vain"
        time.sleep(0.02)
    return found


def write_y4m(path: Path, rgb: tuple[int, int, int], size: tuple[int, int] = (96, 128), frames: int = 4) -> None:
    """A still of one colour, as the raw video that Chromium's fake camera plays (BT.601, limited range)."""
    red, green, blue = (channel / 255 for channel in rgb)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = (16 + 219 * luma, 128 + 224 * (blue - luma) / 1.772, 128 + 224 * (red - luma) / 1.402)
    height, width = size
    sizes = (height * width, height * width // 4, height * width // 4)
    picture = b"".join(np.full(count, round(plane), np.uint8).tobytes() for plane, count in zip(planes, sizes))
    header = f"YUV4MPEG2 W{width} H{height} F30:1 Ip A1:1 C420jpeg\n".encode()
    path.write_bytes(header + (b"FRAME\n" + picture) * frames)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium whose camera sees `CAMERA_RGB`."""
    playwright = pytest.importorskip("playwright.sync_api", reason='no Playwright: pip install "millstream[test]"')
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    camera = tmp_path_factory.mktemp("camera") / "camera.y4m"
    write_y4m(camera, CAMERA_RGB)
    arguments = [
        "--no-sandbox",  # which a container's root needs
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-video-capture={camera}",
        "--autoplay-policy=no-user-gesture-required",
    ]
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


class View:
    """The page in a tab of its own, and what a test reads there."""

    def __init__(self, context: Any, url: str) -> None:
        self.url = url
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = context.new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("requestfailed", self._failed)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.open("")

    def _failed(self, request: Any) -> None:
        if (
            "/gradio_api/queue/data" not in request.url
        ):  # an event stream, which Gradio's script ends by breaking it off
            self.complaints.append(f"failed: {request.url}")

    def _console(self, message: Any) -> None:
        ours = "/assets/" not in message.location.get("url", "")  # Gradio's own script warns of things of its own
        left = "closed before the connection is established" in message.text  # the page was left while it connected
        if message.type == "error" or (message.type == "warning" and ours and not left):
            self.complaints.append(f"{message.type}: {message.text}")

    def open(self, view: str) -> None:
        self.page.goto(f"{self.url}#{view}")
        self.page.wait_for_selector("[data-ready]")

    def start(self) -> None:
        self.page.click(".cover-button:text('Start')")
        until(lambda: "applied" in self.status)

    @property
    def status(self) -> str:
        return self.page.inner_text(".status")

    def colour(self, where: str = "lower", canvas: str = ".screen") -> tuple[int, int, int]:
        """The mean colour, 0 to 255, of half a canvas."""
        top, height = {"upper": (0, 0.4), "lower": (0.6, 0.4)}[where]
        return tuple(self.page.evaluate(MEAN, [canvas, top, height]))

    def until_colour(self, like: Callable[[int, int, int], bool], where: str = "lower") -> None:
        until(lambda: like(*self.colour(where)))

    def picture(self) -> str:
        return self.page.evaluate("document.querySelector('.screen').toDataURL()")


MEAN = """([selector, top, height]) => {
  const canvas = document.querySelector(selector);
  const [rows, skip] = [Math.round(height * canvas.height), Math.round(top * canvas.height)];
  const context = new OffscreenCanvas(canvas.width, rows).getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, -skip);
  const { data } = context.getImageData(0, 0, canvas.width, rows);
  const sums = [0, 0, 0];
  data.forEach((value, i) => i % 4 < 3 && (sums[i % 4] += value));
  return sums.map((sum) => Math.round(sum / (data.length / 4)));
}"""


@pytest.fixture(scope="session")
def world() -> Pictures:
    return Pictures()


@pytest.fixture(scope="session")
def painter() -> Painter:
    return Painter()


@pytest.fixture(scope="session")
def speech(speech_folder: Path) -> Any:
    from millstream.pipelines.audio import AudioPipeline

    return AudioPipeline.from_pretrained(speech_folder)


@pytest.fixture(scope="session")
def server(world: Pictures, painter: Painter, speech: Any) -> Iterator[Server]:
    settings = Settings(model="pictures", max_sessions=30, grace_seconds=5.0, connects=10_000)
    page = PageSettings(
        model="pictures",
        models=("pictures", "freedoom"),
        pipeline=lambda: world,
        image=lambda: painter,
        speech=True,
    )
    running = Server(world, settings, page, speech)
    yield running
    running.close()


@pytest.fixture(scope="session")
def laptop(browser: Any) -> Any:
    """The browser context that most tests share, and with it the cache of Gradio's many files."""
    return browser.new_context(viewport={"width": 1280, "height": 800})


@pytest.fixture
def look(browser: Any, laptop: Any) -> Iterator[Callable[..., View]]:
    """Opens a page: `look(url, **arguments of a browser context)`. At the end nothing may have gone wrong on any."""
    opened: list[View] = []

    def look(url: str, **arguments: Any) -> View:
        viewport = {"viewport": {"width": 1280, "height": 800}}
        context = browser.new_context(**{**viewport, **arguments}) if arguments else laptop
        opened.append(View(context, url))
        return opened[-1]

    yield look
    for view in opened:
        view.page.close()
    assert [view.complaints for view in opened if view.complaints] == []


@pytest.fixture
def view(look: Callable[..., View], server: Server, request: pytest.FixtureRequest) -> View:
    """The page, just opened. Parametrise indirectly with arguments of a browser context, such as a phone's size."""
    return look(server.url, **getattr(request, "param", {}))


@pytest.fixture(scope="session")
def serve() -> type[Server]:
    """`Server`, for test modules."""
    return Server


@pytest.fixture
def wait() -> Callable[..., Any]:
    """`until`, for test modules, which can't import this file."""
    return until
