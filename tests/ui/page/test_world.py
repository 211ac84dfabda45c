"""The page with the embedded world: it walks, it redraws a picture, and every tab has its portrait taken.

The portraits go to docs/images when MILLSTREAM_SCREENSHOTS is set, else to a folder that is thrown away.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from millstream.streaming import Chunk, Recorder
from millstream.ui.commands.image import image_loader
from millstream.ui.page import PageSettings
from millstream.ui.server.settings import Settings
from millstream.ui.speech import load_speech
from millstream.ui.world import load_world

ROOT = Path(__file__).resolve().parents[3]
PORTRAITS = ROOT / "docs" / "images" if os.environ.get("MILLSTREAM_SCREENSHOTS") else None
LINGER = 6000 if PORTRAITS else 0  # milliseconds in which numbers grow curves
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


@pytest.fixture(scope="module")
def freedoom(browser: Any, serve: Any) -> Iterator[Any]:
    pipe, voice = load_world("freedoom", "cpu"), load_speech("speech", "cpu")
    page = PageSettings(pipeline=lambda: pipe, image=image_loader("cpu"), speech=True)
    running = serve(pipe, Settings(model="freedoom", max_sessions=8), page, voice)
    yield running
    running.close()


@pytest.fixture
def portraits(tmp_path: Path) -> Path:
    return PORTRAITS or tmp_path


def take(page: Any, path: Path) -> None:
    """A screenshot that holds more than an empty page."""
    page.screenshot(path=path)
    if PORTRAITS:
        Image.open(path).convert("RGB").save(path, optimize=True)
    assert len(np.unique(np.asarray(Image.open(path).convert("L")))) > 20


def film_a_person(path: Path) -> None:
    """Two seconds of somebody in front of a wall with a window."""
    with Recorder(path, rate=15) as recorder:
        for number in range(30):
            picture = Image.new("RGB", (320, 240), (150, 132, 110))
            draw = ImageDraw.Draw(picture)
            draw.rectangle((0, 190, 320, 240), fill=(92, 74, 58))
            draw.rectangle((205, 30, 290, 120), fill=(190, 214, 226), outline=(90, 78, 66), width=5)
            x = 120 + 12 * np.sin(number / 30 * 2 * np.pi)
            draw.ellipse((x - 70, 150, x + 70, 300), fill=(58, 84, 66))
            draw.ellipse((x - 34, 72, x + 34, 164), fill=(206, 160, 130))
            draw.pieslice((x - 38, 60, x + 38, 150), 180, 360, fill=(60, 42, 32))
            data = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
            recorder.write(Chunk("video", data, number, 15, 0, 0.0))


def test_the_embedded_world_walks(freedoom: Any, look: Any, wait: Any, portraits: Path) -> None:
    view = look(freedoom.url)
    view.page.click(".cover-button:text('Start')")
    view.page.click(".world:text('a round tan arena at night')")
    view.page.fill(".seed input", "7")
    view.page.click(".reset")
    wait(lambda: "applied" in view.status)
    view.page.keyboard.down("ArrowRight")
    (seat,) = (seat for seat in freedoom.sessions.seats if seat.viewer is not None)
    wait(lambda: seat.session.control.keys == {"ArrowRight"} and seat.session.applied == seat.session.control.version)
    seen = view.picture()
    wait(lambda: view.picture() != seen, 60)
    view.page.wait_for_timeout(LINGER)
    take(view.page, portraits / "page-play.png")
    view.page.keyboard.up("ArrowRight")
    view.page.click("#tab-numbers")
    view.page.wait_for_timeout(LINGER)
    wait(lambda: "–" not in view.page.inner_text(".tile .value"))
    take(view.page, portraits / "page-numbers.png")
    view.page.click(".model")
    wait(lambda: "transformer" in view.page.inner_text(".plan"))
    take(view.page, portraits / "page-model.png")


def test_the_embedded_world_redraws_a_picture(freedoom: Any, look: Any, wait: Any, portraits: Path) -> None:
    view = look(freedoom.url, color_scheme="dark")
    view.page.click("#tab-camera")
    view.page.wait_for_selector(".cover-button:text('Use the camera')")
    film_a_person(portraits / "person.mp4")
    view.page.set_input_files(".source input[type=file]", portraits / "person.mp4")
    wait(lambda: "applied" in view.status, 60)
    view.page.fill(".strength", "0.45")
    before, after = view.colour("upper", ".before canvas"), view.colour("upper")
    wait(lambda: view.colour("upper") != after, 60)
    assert view.colour("upper") != before
    view.page.fill(".wipe", "45")
    view.page.wait_for_timeout(LINGER)
    take(view.page, portraits / "page-camera.png")
    (portraits / "person.mp4").unlink()


def test_the_embedded_world_draws_a_clip(freedoom: Any, look: Any, wait: Any, portraits: Path) -> None:
    view = look(freedoom.url)
    view.page.click("#tab-generate")
    view.page.fill("#ms-clip-prompt textarea", "a tan brick hall with pink worms and demons")
    view.page.fill("#ms-clip-frames input", "40" if PORTRAITS else "4")
    view.page.click("#ms-draw")
    wait(lambda: "frames, " in view.page.inner_text("#ms-clip-told"), 120)
    view.page.wait_for_selector("#ms-clip video")
    wait(lambda: view.page.evaluate("document.querySelector('#ms-clip video').readyState") >= 2)
    view.page.wait_for_timeout(LINGER / 4)
    take(view.page, portraits / "page-generate.png")


def test_the_embedded_pictures_follow_what_is_typed(freedoom: Any, look: Any, wait: Any, portraits: Path) -> None:
    view = look(freedoom.url)
    view.page.click("#tab-image")
    view.page.locator("#ms-image-prompt textarea").wait_for(state="visible")
    view.page.wait_for_load_state("networkidle")
    view.page.fill("#ms-image-prompt textarea", "a red apple")
    wait(lambda: "drawn in" in view.page.inner_text("#ms-image-pictures"), 60)
    assert view.page.locator("#ms-image-pictures img").count() == 4
    take(view.page, portraits / "page-image.png")


def test_the_embedded_voice_speaks(freedoom: Any, look: Any, wait: Any, portraits: Path) -> None:
    view = look(freedoom.url)
    view.page.click("#tab-sound")
    wait(lambda: view.page.inner_text("#panel-sound .line") == "Ready")
    view.page.fill("#say-text", "A millstream is a steady current, put to work. What it carries, it carries on.")
    view.page.press("#say-text", "Enter")
    wait(lambda: "first sound" in view.page.inner_text("#panel-sound .line"), 60)
    view.page.wait_for_timeout(LINGER / 3)
    take(view.page, portraits / "page-sound.png")
    kept = "document.querySelector('.ms').page.sound.kept"
    assert view.page.evaluate(f"Math.max(...{kept}.map((piece) => Math.max(...piece)))") > 0.05


def test_a_phone(freedoom: Any, look: Any, wait: Any, portraits: Path) -> None:
    view = look(freedoom.url, **PHONE, color_scheme="dark")
    view.page.tap(".cover-button:text('Start')")
    wait(lambda: "applied" in view.status, 60)
    view.page.wait_for_timeout(LINGER)
    take(view.page, portraits / "page-phone.png")
