"""The Sound tab in a real browser: words become sound that is played without gaps."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from millstream.pipelines import assets
from millstream.ui.page import PageSettings
from millstream.ui.server.settings import Settings

LINE = re.compile(r"first sound \d+ ms · \d+\.\d\d x real time · \d+ underruns?")
TELL = """(() => {
  const { player, speaking, kept, rate } = document.querySelector(".ms").page.sound;
  const samples = kept.reduce((sum, piece) => sum + piece.length, 0);
  const peak = kept.reduce((most, piece) => Math.max(most, ...piece.map(Math.abs)), 0);
  const { scheduled, underruns, ahead } = player;
  return { speaking, samples, peak, rate, scheduled, underruns, ahead };
})()"""


def breaks(pieces: list[dict[str, float]]) -> int:
    """How often a piece does not begin where the one before ends."""
    return sum(abs(after["at"] - piece["at"] - piece["seconds"]) > 1e-6 for piece, after in pairwise(pieces))


class Tab:
    def __init__(self, view: Any, wait: Callable[..., Any]) -> None:
        self.page, self.wait = view.page, wait
        view.page.click("#tab-sound")
        self.line(lambda line: line == "Ready")

    def line(self, wanted: Callable[[str], bool]) -> str:
        read = lambda: self.page.inner_text("#panel-sound .line")  # noqa: E731
        return self.wait(lambda: read() if wanted(read()) else "")

    def speak(self, text: str) -> None:
        self.page.fill("#say-text", text)
        self.page.press("#say-text", "Enter")

    def told(self) -> dict[str, Any]:
        return self.page.evaluate(TELL)

    def until_said(self) -> dict[str, Any]:
        self.wait(lambda: self.told()["samples"] > 0 and not self.told()["speaking"])
        return self.told()


@pytest.fixture
def tab(view: Any, wait: Callable[..., Any]) -> Tab:
    return Tab(view, wait)


def test_speech_arrives_and_is_played_without_gaps(tab: Tab) -> None:
    assert tab.page.eval_on_selector_all("[name=voice] option", "options => options.map((o) => o.value)") == [
        "ann",
        "bob",
    ]
    tab.page.select_option("[name=voice]", "bob")
    tab.speak("hello there my old friend")
    told = tab.until_said()
    assert told["rate"] == 16000
    assert told["peak"] > 0
    pieces = told["scheduled"]
    assert len(pieces) > 3
    assert told["samples"] == round(16000 * sum(piece["seconds"] for piece in pieces))
    assert breaks(told["scheduled"]) == told["underruns"]
    assert LINE.fullmatch(tab.line(lambda line: "real time" in line))
    tab.wait(lambda: tab.page.eval_on_selector(".stop", "button => button.disabled"))


def test_words_are_appended_while_it_speaks(tab: Tab) -> None:
    tab.speak("hello there my old friend, how do you do; it is so good to see you here, in this old town")
    tab.wait(lambda: tab.told()["samples"] > 0)
    assert tab.told()["speaking"]
    tab.speak("and one more thing")
    assert tab.page.input_value("#say-text") == ""
    first = tab.told()["scheduled"][0]
    told = tab.until_said()
    assert told["scheduled"][0] == first  # one stretch of sound
    assert breaks(told["scheduled"]) == told["underruns"]
    with tab.page.expect_download() as download:
        tab.page.click(".save")
    assert download.value.suggested_filename == "millstream.wav"
    data = download.value.path().read_bytes()
    assert data[:4] == b"RIFF"
    assert len(data) == 44 + 2 * told["samples"]


def test_stop_is_quiet_at_once_and_speech_begins_anew(tab: Tab) -> None:
    tab.speak("a very long tale, " * 60)
    tab.wait(lambda: tab.told()["samples"] > 0)
    tab.page.click("#panel-sound .stop")
    assert tab.told()["ahead"] == 0
    tab.wait(lambda: not tab.page.evaluate("document.querySelector('.ms').page.sound.stopping"))
    samples = tab.told()["samples"]
    tab.page.wait_for_timeout(300)
    assert tab.told()["samples"] == samples
    tab.speak("hello")
    assert tab.until_said()["samples"] > 0


def test_a_refusal_is_a_notice(tab: Tab) -> None:
    tab.speak("…")
    tab.wait(lambda: "nothing to say" in tab.page.inner_text(".notice"))


def test_leaving_the_tab_is_silence(tab: Tab) -> None:
    tab.speak("a very long tale, " * 60)
    tab.wait(lambda: tab.told()["samples"] > 0)
    tab.page.click("#tab-play")
    tab.wait(lambda: tab.told()["ahead"] == 0 and not tab.told()["speaking"])


def test_a_server_without_a_model_says_so(
    serve: Any, world: Any, look: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(assets, "ASSETS", tmp_path)
    running = serve(world, Settings(model="pictures"), PageSettings(model="pictures"))
    view = look(running.url)
    view.page.click("#tab-sound")
    assert "no speaking model" in view.page.inner_text("#panel-sound")
    assert not view.page.is_visible("#say-text")
    view.page.close()
    running.close()


@pytest.mark.parametrize(
    "view",
    [
        {"color_scheme": "dark"},
        {"color_scheme": "light"},
        {"viewport": {"width": 390, "height": 800}, "has_touch": True, "is_mobile": True},
    ],
    indirect=True,
)
def test_it_fits_every_screen(tab: Tab, request: pytest.FixtureRequest) -> None:
    tab.speak("hello there my old friend")
    tab.until_said()
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    painted = "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean)"
    tab.wait(lambda: tab.page.eval_on_selector(".wave", painted))
