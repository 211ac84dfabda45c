import math

import pytest

from millstream.streaming import Control, SpeechControl, VideoControl, WorldControl


def test_a_change_gives_a_new_control_with_the_next_version():
    control = WorldControl(prompt="a cave")
    changed = control.changed(keys={"KeyW"})
    assert (changed.keys, changed.prompt, changed.version) == (frozenset({"KeyW"}), "a cave", 1)
    assert control == WorldControl(prompt="a cave")


def test_unknown_controls_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="unknown control key, speed; valid controls are prompt, keys, mouse"):
        WorldControl().changed(key={"KeyW"}, speed=3)
    with pytest.raises(ValueError, match="unknown control version"):
        Control().changed(version=7)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Control(prompt=3), TypeError, "prompt must be a string, got int"),
        (lambda: Control(prompt="x" * 10_000), ValueError, "10,000 characters; at most 2,000"),
        (lambda: WorldControl(keys="KeyW"), TypeError, "keys must be a set of key codes"),
        (lambda: WorldControl(keys=None), TypeError, "keys must be a set of key codes"),
        (lambda: WorldControl(keys={1}), TypeError, "keys must be a set of key codes"),
        (lambda: WorldControl(mouse=(1.0,)), TypeError, "mouse must be two numbers"),
        (lambda: WorldControl(mouse=("left", 2)), TypeError, "mouse must be two numbers"),
        (lambda: WorldControl(mouse=None), TypeError, "mouse must be two numbers"),
        (lambda: WorldControl(mouse=(math.nan, 0)), ValueError, "mouse movement must be finite"),
        (lambda: VideoControl(strength=1.5), ValueError, "strength must be between 0"),
        (lambda: VideoControl(strength=math.nan), ValueError, "strength must be between 0"),
        (lambda: VideoControl(strength="much"), TypeError, "strength must be a number"),
        (lambda: VideoControl(switch="jump"), ValueError, "switch must be keep, recache, lerp or cut"),
        (lambda: SpeechControl(text=None), TypeError, "text must be a string"),
    ],
)
def test_bad_controls_are_refused_in_one_sentence(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_short_inputs_survive_merging_and_movement_does_not_outlast_a_step():
    first = WorldControl(keys={"KeyW"}, mouse=(3, -1))
    second = first.changed(keys=set(), mouse=(1, 1))
    merged = first.merged(second)
    assert (merged.keys, merged.mouse, merged.version) == (frozenset({"KeyW"}), (4.0, 0.0), 1)
    assert merged.held().mouse == (0.0, 0.0)
    assert merged.held().keys == {"KeyW"}
