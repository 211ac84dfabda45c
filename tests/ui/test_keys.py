"""Key scripts are read exactly or refused; held keys are guessed the way a walker means them."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.ui.keys import HeldKeys, KeyScript

VALID = ("KeyW", "KeyA", "KeyS", "KeyD", "ArrowLeft", "ArrowRight", "Space")


def first(script: str, frames: int) -> list[set[str]]:
    return [set(keys) for keys in islice(KeyScript.parse(script, VALID), frames)]


def test_a_script_is_played_frame_by_frame_and_then_again() -> None:
    walked = first("KeyW*2 ArrowLeft KeyW+Space*1 -", 7)
    assert walked == [{"KeyW"}, {"KeyW"}, {"ArrowLeft"}, {"KeyW", "Space"}, set(), {"KeyW"}, {"KeyW"}]


@pytest.mark.parametrize("script", ["", "  ", "-*3", "None"])
def test_no_key_at_all(script: str) -> None:
    assert first(script, 4) == [set()] * 4


@given(st.lists(st.tuples(st.sets(st.sampled_from(VALID)), st.integers(1, 50)), min_size=1, max_size=8))
def test_any_script_is_played_for_as_long_as_it_says(runs: list[tuple[set[str], int]]) -> None:
    text = " ".join(f"{'+'.join(keys) or '-'}*{count}" for keys, count in runs)
    wanted = [keys for keys, count in runs for _ in range(count)]
    assert first(text, len(wanted)) == wanted


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("Keyw*3", r"unknown key 'Keyw': did you mean KeyW\? valid keys are ArrowLeft, .*Space"),
        ("Fire", "unknown key 'Fire'"),
        ("KeyW+*3", "unknown key ''"),
        ("KeyW+None*3", "unknown key 'None'"),
        ("KeyW*0", "between 1 and 1,000,000"),
        ("KeyW*1000001", "between 1 and 1,000,000"),
        ("KeyW*-3", "must look like"),
        ("KeyW*", "must look like"),
        ("*3", "must look like"),
        ("KeyW * 3", "must look like"),
    ],
)
def test_a_bad_script_is_refused_with_what_is_wrong(script: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyScript.parse(script, VALID)


def test_a_press_counts_for_a_while_and_a_repeat_renews_it() -> None:
    held = HeldKeys(hold=0.3)
    assert held.held(0.0) == set()
    held.press("KeyW", 0.0)
    assert held.held(0.29) == {"KeyW"}
    assert held.held(0.31) == set()
    held.press("KeyW", 0.5)
    held.press("KeyW", 0.7)
    assert held.held(0.99) == {"KeyW"}


def test_a_repeating_key_stays_down_while_a_newer_one_repeats() -> None:
    held = HeldKeys(hold=0.3)
    for moment in (0.0, 0.1, 0.2):
        held.press("KeyW", moment)
    for moment in (0.3, 0.5, 0.7, 0.9, 1.1):  # the system repeats only the key pressed last
        held.press("ArrowLeft", moment)
    assert held.held(1.2) == {"KeyW", "ArrowLeft"}
    assert held.held(1.5) == set()


def test_a_tapped_key_does_not_stay_down_with_a_newer_one() -> None:
    held = HeldKeys(hold=0.3)
    held.press("KeyW", 0.0)
    for moment in (0.2, 0.4, 0.6):
        held.press("ArrowLeft", moment)
    assert held.held(0.7) == {"ArrowLeft"}


def test_opposite_keys_end_each_other() -> None:
    held = HeldKeys(hold=0.3)
    held.press("KeyW", 0.0)
    held.press("KeyW", 0.1)
    held.press("KeyS", 0.2)
    assert held.held(0.25) == {"KeyS"}
