"""The page in a real browser, on a real server with a quick model: what a person would see and do."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import pytest

from millstream.ui.page import PageSettings
from millstream.ui.page.memory import memory_plan
from millstream.ui.server.protocol import Close
from millstream.ui.server.settings import Settings

STATUS = re.compile(r"\d+\.\d fps · \d+ ms old · \d+ dropped · v\d+ applied")
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
VIEWS = ("play", "camera", "generate", "image", "sound", "numbers")


def test_everything_comes_from_this_server(view: Any, server: Any) -> None:
    view.page.wait_for_selector(".cover-button:text('Start')")
    view.page.wait_for_load_state("networkidle")
    hosts = {urlsplit(url).netloc for url in view.requests if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(server.url).netloc}
    assert view.page.title() == "millstream"


def test_start_draws_and_tells_how_it_goes(view: Any, wait: Any) -> None:
    view.start()
    first = view.picture()
    wait(lambda: view.picture() != first)
    numbers = lambda: [float(number) for number in re.findall(r"[\d.]+", view.status)]  # noqa: E731
    wait(lambda: STATUS.fullmatch(view.status.strip()) and 5 < numbers()[0] < 40)
    assert numbers()[1] < 1000


def test_keys_steer_and_are_let_go(view: Any) -> None:
    view.start()
    keyboard = view.page.keyboard
    keyboard.down("KeyW")
    view.until_colour(lambda red, green, blue: green > 200 and blue < 60)
    keyboard.up("KeyW")
    keyboard.down("ArrowLeft")
    view.until_colour(lambda red, green, blue: green < 60 and blue > 200)
    keyboard.up("ArrowLeft")
    view.until_colour(lambda red, green, blue: green < 60 and blue < 60)


def test_a_click_takes_the_mouse_and_its_movement_turns(view: Any, world: Any, wait: Any) -> None:
    view.start()
    view.page.click(".stage")
    wait(lambda: view.page.evaluate("document.pointerLockElement?.classList.contains('stage')"))
    before = len(world.controls)
    view.page.mouse.move(300, 300)
    view.page.mouse.move(360, 310)
    wait(lambda: sum(control.mouse[0] for control in world.controls[before:]) != 0)
    view.page.evaluate("document.exitPointerLock()")
    wait(lambda: not view.page.evaluate("Boolean(document.pointerLockElement)"))


def test_a_window_that_loses_the_focus_lets_every_key_go(view: Any) -> None:
    view.start()
    view.page.keyboard.down("KeyW")
    view.until_colour(lambda red, green, blue: green > 200)
    view.page.evaluate("dispatchEvent(new Event('blur'))")
    view.until_colour(lambda red, green, blue: green < 60)


def test_typing_a_prompt_does_not_walk_and_enter_applies_it(view: Any, wait: Any) -> None:
    view.start()
    view.until_colour(lambda red, green, blue: red < 30)
    view.page.keyboard.press("/")
    line = view.page.locator("input[name=prompt]")
    wait(lambda: line.evaluate("line => line === document.activeElement"))
    line.fill("www")
    view.page.keyboard.down("KeyW")
    view.page.wait_for_timeout(200)
    assert view.colour()[1] < 60
    view.page.keyboard.up("KeyW")
    line.fill("a moonlit swamp")
    assert view.page.inner_text(".hint") == "Enter applies it."
    line.press("Enter")
    view.until_colour(lambda red, green, blue: 35 < red < 80)
    wait(lambda: "Nearest world: “a brick corridor with soldiers” (0.42)" in view.page.inner_text(".hint"))
    wait(lambda: re.search(r"v[1-9]\d* applied", view.status))


def test_world_buttons_change_the_world(view: Any, wait: Any) -> None:
    view.start()
    view.page.click(".world:text('a dark maze with red walls')")
    view.until_colour(lambda red, green, blue: red > 200)
    assert view.page.input_value("input[name=prompt]") == "a dark maze with red walls"
    wait(lambda: view.page.get_attribute(".world >> nth=2", "aria-pressed") == "true")


def test_pause_holds_the_picture_and_step_draws_one(view: Any, server: Any, wait: Any) -> None:
    view.start()
    view.page.click(".run:text('Pause')")
    wait(lambda: view.status.strip() == "Paused")
    view.page.wait_for_timeout(200)
    (seat,) = (seat for seat in server.sessions.seats if seat.viewer is not None)
    frame, held = seat.frame, view.picture()
    view.page.wait_for_timeout(300)
    assert view.picture() == held
    view.page.click("text='Step'")
    wait(lambda: view.picture() != held)
    assert seat.frame == frame + 1


def test_reset_takes_the_seed_that_was_typed(view: Any, server: Any, wait: Any) -> None:
    view.start()
    view.page.fill(".seed input", "1234")
    view.page.click(".reset")
    wait(lambda: any(seat.seed == 1234 for seat in server.sessions.seats))


def test_back_and_branch(view: Any, server: Any, wait: Any) -> None:
    view.start()
    (seat,) = (seat for seat in server.sessions.seats if seat.viewer is not None)
    wait(lambda: seat.position > 1.5)
    view.page.click(".branch")
    view.page.wait_for_selector(".branches button:text('Branch 1')")
    view.page.fill("input[name=prompt]", "a maze that nobody has learnt")
    view.page.keyboard.press("Enter")
    wait(lambda: "Nearest world" in view.page.inner_text(".hint"))
    view.page.click(".branches button:text('Branch 1')")
    wait(lambda: view.page.inner_text(".hint") == "Applied.")
    view.page.click(".world:text('a dark maze with red walls')")
    view.until_colour(lambda red, green, blue: red > 200)
    view.page.click(".branches button:text('Main')")
    view.page.click(".branches button:text('Branch 1')")
    view.page.click(".world:text('a brick corridor with soldiers')")
    view.until_colour(lambda red, green, blue: red < 60)
    wait(lambda: view.page.input_value("input[name=prompt]") == "a brick corridor with soldiers")
    assert view.page.get_attribute(".branches button:text('Branch 1')", "aria-pressed") == "true"
    wait(lambda: len(seat.history._moments) > 0)
    view.page.click(".back")
    wait(lambda: re.search(r"Back \d+ second", view.page.inner_text(".notice")))
    view.open("camera")
    view.page.wait_for_selector(".branches", state="hidden")
    view.open("play")
    view.page.wait_for_selector(".branches button:text('Branch 1')")


def test_timeline_changes_the_prompt_by_itself(view: Any, wait: Any) -> None:
    view.start()
    view.page.click("text=Add a prompt for later")
    view.page.fill(".timeline input[type=text]", "a dark maze with red walls")
    view.page.fill(".timeline input[type=number]", "0")
    view.page.keyboard.press("Tab")
    view.until_colour(lambda red, green, blue: red > 200)
    assert view.page.locator(".ruler .mark.past").count() == 1
    wait(lambda: view.page.input_value("input[name=prompt]") == "a dark maze with red walls")
    wait(lambda: view.page.inner_text(".hint") == "Applied.")


def test_a_dropped_socket_comes_back_to_the_same_session(view: Any, server: Any, wait: Any) -> None:
    view.start()
    view.page.click(".world:text('a dark maze with red walls')")
    view.until_colour(lambda red, green, blue: red > 200)
    (seat,) = (seat for seat in server.sessions.seats if seat.viewer is not None)
    dropped = seat.viewer
    server.sessions._loop.call_soon_threadsafe(dropped.end, Close.GOING_AWAY, "restarting")
    wait(lambda: seat.viewer is not None and seat.viewer is not dropped)
    frame = seat.frame
    wait(lambda: seat.frame > frame + 3)
    wait(lambda: STATUS.fullmatch(view.status.strip()))
    view.until_colour(lambda red, green, blue: red > 200)


def test_numbers_show_what_runs(view: Any, wait: Any) -> None:
    view.start()
    view.page.keyboard.press("KeyW")
    view.page.click("#tab-numbers")
    tiles = view.page.locator(".tile")
    values = lambda: dict(zip(tiles.locator("h3").all_inner_texts(), tiles.locator(".value").all_inner_texts()))  # noqa: E731
    wait(lambda: "–" not in values().values())
    shown = values()
    assert float(shown["Frames per second"]) > 5
    assert shown["Frame age"].endswith(" ms")
    assert float(shown["Memory"].replace(",", "").removesuffix(" MB")) > 50
    assert "pictures: 64 × 48 at 25.0 frames/s" in view.page.inner_text(".facts")


def test_the_picker_tells_the_memory_before_it_loads(view: Any, wait: Any) -> None:
    view.page.click(".model")
    wait(lambda: view.page.locator(".plan-row").count() > 0)
    view.page.select_option(".picker select[name=model]", "freedoom")
    wait(lambda: "transformer" in view.page.inner_text(".plan"))
    planned = memory_plan("freedoom").total / 1e6
    assert re.search(rf"together\s+{planned:.1f} MB", view.page.inner_text(".plan"))
    assert "millstream serve --model freedoom" in view.page.inner_text(".command")
    view.page.keyboard.press("Escape")
    assert not view.page.locator(".picker").is_visible()


@pytest.mark.parametrize("view", [PHONE], indirect=True)
def test_a_phone_scrolls_down_only_and_steers_by_touch(view: Any) -> None:
    for name in VIEWS:
        view.page.click(f"#tab-{name}")
        view.page.wait_for_timeout(100)
        wide = view.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1], f"{name} is {wide[0]} pixels wide on a screen of {wide[1]}"
    view.page.click("#tab-play")
    view.start()
    button = view.page.get_by_label("Move forward")
    button.dispatch_event("pointerdown", {"pointerId": 1, "isPrimary": True})
    view.until_colour(lambda red, green, blue: green > 200)
    button.dispatch_event("pointerup", {"pointerId": 1})
    view.until_colour(lambda red, green, blue: green < 60)


def test_tabs_and_controls_work_without_a_mouse(view: Any, wait: Any) -> None:
    page = view.page
    page.focus("#tab-play")
    for name in (*VIEWS[1:], VIEWS[0]):
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.id") == f"tab-{name}"
        assert page.url.endswith(f"#{name}")
    page.wait_for_selector(".cover-button:text('Start')")
    page.focus(".cover-button")
    page.keyboard.press("Enter")
    wait(lambda: "applied" in view.status)
    page.focus(".run")
    page.keyboard.press("Space")
    wait(lambda: view.status.strip() == "Paused")


def test_every_control_has_a_name(view: Any) -> None:
    nameless = view.page.evaluate("""() =>
        [...document.querySelectorAll(".ms :is(button, input, select, [role=tab], canvas[role=img])")]
            .filter((element) => !(element.getAttribute("aria-label") || element.getAttribute("aria-labelledby")
                || element.closest("label")?.textContent.trim() || element.textContent.trim()))
            .map((element) => element.outerHTML)""")
    assert [html for html in nameless if "cover-button" not in html] == []


@pytest.mark.parametrize("view", [{"reduced_motion": "reduce", "color_scheme": "dark"}], indirect=True)
def test_motion_and_colour_follow_the_system(view: Any) -> None:
    assert view.page.evaluate("getComputedStyle(document.querySelector('.run')).transitionDuration") == "0s"
    background = view.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in re.findall(r"\d+", background)) < 60


def test_a_lost_server_is_said_and_tried_again(look: Any, serve: Any, world: Any, wait: Any) -> None:
    own = serve(world, Settings(model="pictures"), PageSettings(model="pictures"))
    view = look(own.url)
    view.start()
    own.close()
    wait(lambda: view.page.inner_text(".cover-title") == "The connection was lost")
    assert "Trying again in" in view.page.inner_text(".cover-text") or "restart" in view.page.inner_text(".cover-text")
    assert view.page.is_disabled(".record")
    view.complaints.clear()  # the browser logs each vain attempt


def test_who_finds_all_places_taken_is_told_the_place_in_the_queue(
    look: Any, serve: Any, world: Any, wait: Any
) -> None:
    own = serve(world, Settings(model="pictures", max_sessions=1, grace_seconds=0.2), PageSettings(model="pictures"))
    first = look(own.url)
    first.start()
    second = look(own.url)
    wait(lambda: second.page.inner_text(".cover-title") == "All places are taken")
    assert "number 1 in the queue" in second.page.inner_text(".cover-text")
    first.page.goto("about:blank")
    wait(lambda: second.page.inner_text(".cover-button") == "Start")
    own.close()


def test_the_newest_picture_wins_and_the_best_clock_sample_counts(view: Any) -> None:
    drawn = view.page.evaluate("""async () => {
      const { Screen } = await import("/page/screen.js");
      const { Clock } = await import("/page/clock.js");
      const canvas = document.createElement("canvas");
      const drawn = [];
      const screen = new Screen(canvas, { ageOf: () => 0, drawn: (frame) => drawn.push(frame.number) });
      const source = new OffscreenCanvas(8, 8);
      source.getContext("2d").fillRect(0, 0, 8, 8);
      const picture = await source.convertToBlob({ type: "image/jpeg" });
      const bytes = { type: picture.type, data: new Uint8Array(await picture.arrayBuffer()) };
      for (let number = 0; number < 6; number++) screen.offer({ number, picture: bytes, version: 1, time: 0 });
      await new Promise((resolve) => setTimeout(resolve, 400));
      const clock = new Clock();
      clock.answer(1000, 5060, 1100); // 100 ms there and back: anything from 4960 to 5060 ahead fits
      clock.answer(2000, 6005, 2010);
      const times = { offset: clock.toPage(6005), trip: clock.trip };
      return { last: drawn.at(-1), lost: screen.skipped, count: drawn.length, ...times };
    }""")
    assert drawn["last"] == 5
    assert drawn["count"] + drawn["lost"] == 6
    assert drawn["count"] <= 2
    assert (drawn["offset"], drawn["trip"]) == (2005, 10)
