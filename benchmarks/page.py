"""How quick the page is in a real browser, as JSON: camera to canvas, and a key to the first picture that answers it.

    python benchmarks/page.py                    20 seconds of each, headless Chromium, a model that does nothing
    python benchmarks/page.py --seconds 5
    python benchmarks/page.py --model freedoom   the world that ships: how much of the model's speed reaches the canvas

Chromium's fake camera gives 30 pictures a second; ages are those the page itself takes, when a frame is on the canvas.
`model` is what the model did meanwhile, beside the browser: its step times, and the frames it has drawn per second, of
which `fps` reached the canvas. Where both share the cores, a step takes longer than alone. `cpu` is cores used, by the
server and by the browser.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from serve import KINDS, Mirror, percentile

RATE, SIZE = 30.0, (240, 320)
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
LISTEN = """() => {
  const { screen, live } = document.querySelector(".ms").page;
  window.seen = { ages: [], responses: [], start: performance.now() };
  const drawn = (window.plain ??= screen.drawn);
  screen.drawn = (frame, age) => {
    const before = live.response;
    drawn(frame, age);
    if (Number.isFinite(age)) window.seen.ages.push(age);
    if (live.response !== before) window.seen.responses.push(live.response);
  };
}"""


def serve_page(ready: Connection, model: str | None) -> None:
    """The server's process."""
    import torch

    from millstream.ui.commands.serve import listen, make_server
    from millstream.ui.page import PageSettings
    from millstream.ui.server.app import create_app
    from millstream.ui.world import load_world

    if model is None:
        torch.set_num_threads(1)
    pipe = Mirror(RATE, SIZE) if model is None else load_world(model)
    app = create_app(pipe, page=PageSettings(model=model or "nothing"))
    listener = listen("127.0.0.1", 0)
    ready.send(listener.getsockname()[1])
    make_server(app, None).run(sockets=[listener])


def write_film(path: Path) -> None:
    """Noise that moves, as raw video for the fake camera."""
    import numpy as np

    width, height, generator = SIZE[1], SIZE[0], np.random.default_rng(0)
    coarse = generator.integers(16, 235, (height // 16, width // 16), np.uint8).repeat(16, 0).repeat(16, 1)
    grey = np.full(width * height // 2, 128, np.uint8).tobytes()
    frames = [b"FRAME\n" + np.roll(coarse, 4 * shift, 1).tobytes() + grey for shift in range(30)]
    path.write_bytes(f"YUV4MPEG2 W{width} H{height} F30:1 Ip A1:1 C420jpeg\n".encode() + b"".join(frames))


def summary(values: list[float]) -> dict[str, float]:
    return {f"p{percent}": round(percentile(values, percent), 1) for percent in (50, 95, 99)}


def camera(page: Any, seconds: float) -> dict[str, Any]:
    """Frames per second on the canvas and their age since the camera saw them."""
    page.click("#tab-camera")
    page.click(".cover-button:text('Use the camera')")
    page.wait_for_timeout(3000)
    page.evaluate(LISTEN)
    page.wait_for_timeout(1000 * seconds)
    seen = page.evaluate("({ ...seen, seconds: (performance.now() - seen.start) / 1000 })")
    return {"fps": round(len(seen["ages"]) / seen["seconds"], 1), "age_ms": summary(seen["ages"])}


def cores_used() -> dict[str, float]:
    """Seconds of processor time so far: the server's, and the browser's."""
    import psutil

    used = {"server": 0.0, "browser": 0.0}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            name, times = process.name(), process.cpu_times()
            used["browser" if "chrom" in name else "server"] += times.user + times.system
    return used


def steps_of(page: Any) -> int:
    """Steps that the model has taken so far."""
    return page.evaluate("fetch('metrics').then((answer) => answer.json()).then(({ steps }) => steps)")


def play(page: Any, seconds: float, keys: Sequence[str]) -> dict[str, Any]:
    """Frames per second, age since the step, and the time from a key to the first frame drawn under it."""
    page.click("#tab-play")
    page.click(".cover-button:text('Start')")
    page.wait_for_timeout(3000)
    page.evaluate(LISTEN)
    before, drawn = cores_used(), steps_of(page)
    press = "(code) => document.querySelector('.ms').page.keys[code ? 'press' : 'releaseAll'](code)"
    for turn in range(int(seconds * 2)):
        page.evaluate(press, keys[turn % len(keys)] if turn % 2 else None)
        page.wait_for_timeout(500)
    seen = page.evaluate("({ ...seen, seconds: (performance.now() - seen.start) / 1000 })")
    status = page.evaluate("document.querySelector('.ms').page.live.status")
    after, drawn = cores_used(), steps_of(page) - drawn
    return {
        "fps": round(len(seen["ages"]) / seen["seconds"], 1),
        "age_ms": summary(seen["ages"]),
        "control_ms": summary(seen["responses"]),
        "model": {"step_ms": status["step_ms"], "fps": round(drawn / seen["seconds"], 1)},
        "dropped": status["dropped"],
        "cpu": {name: round((after[name] - before[name]) / seen["seconds"], 2) for name in after},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--model", help="a world to play; default: one that does nothing, played and behind the camera")
    asked = parser.parse_args()
    from playwright.sync_api import sync_playwright

    from millstream.ui.machine import machine, versions

    browser = next(filter(None, map(shutil.which, CHROMIUM)), None) or sys.exit("there is no Chromium on this machine")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve_page, args=(theirs, asked.model), daemon=True)
    server.start()
    address = f"http://127.0.0.1:{ours.recv()}/"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        film = Path(folder) / "film.y4m"
        write_film(film)
        fake = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        arguments = ["--no-sandbox", *fake, f"--use-file-for-fake-video-capture={film}"]
        chromium = playwright.chromium.launch(executable_path=browser, args=arguments)
        page = chromium.new_page()
        page.goto(address)
        page.wait_for_selector("[data-ready]")
        load = os.getloadavg()[0]
        numbers = {"browser": chromium.version}
        if asked.model is None:
            numbers["camera"] = camera(page, asked.seconds)
        keys = [f"Key{number}" for number in range(KINDS)] if asked.model is None else ["KeyW", "ArrowLeft"]
        numbers["play"] = play(page, asked.seconds, keys)
        chromium.close()
    server.terminate()
    print(
        json.dumps({"machine": machine(), "versions": versions(), "load_before": round(load, 1), **numbers}, indent=2)
    )


if __name__ == "__main__":
    main()
