"""The words of the socket: what is read, what is refused, what is hung up on."""

from __future__ import annotations

import contextlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.ui.server.protocol import (
    MAX_CAMERA_BYTES,
    MAX_TEXT_BYTES,
    Broken,
    Close,
    Refused,
    pack_audio,
    pack_video,
    parse,
    unpack_camera,
)


def message(type: str, **fields) -> str:
    return json.dumps({"type": type, **fields})


def test_what_is_read_is_clean():
    read = parse(message("steer", id=3, keys=["KeyW", "KeyW"], mouse=[1, -2.5]))
    assert (read.type, read.id) == ("steer", 3)
    assert read.fields == {"keys": frozenset({"KeyW"}), "mouse": (1, -2.5)}
    assert parse(message("hello", protocol=1, formats=["avif", "webp"])).fields["formats"] == ("webp",)
    entries = parse(message("timeline", entries=[{"at": 9, "prompt": "b"}, {"at": 0.5, "prompt": "a"}])).fields
    assert [entry["prompt"] for entry in entries["entries"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (message("dance"), "unknown message"),
        (message("start", now=True), "start has no fields"),
        (message("steer", speed=1), "unknown field"),
        (message("steer", keys="KeyW"), "key codes"),
        (message("steer", keys=["K" * 33]), "key codes"),
        (message("steer", keys=["k"] * 17), "at most 16"),
        (message("steer", keys=[["KeyW"]]), "key codes"),
        (message("steer", mouse=[1]), "two numbers"),
        (message("steer", mouse=[1e300, 0]), "-10000 to 10000"),
        (message("steer", mouse=[True, 0]), "-10000 to 10000"),
        (message("steer", prompt="x" * 2001), "2,000 characters"),
        (message("steer", prompt=5), "text"),
        (message("steer", strength="1"), "number from 0 to 1"),
        (message("steer", num_inference_steps=1000), "from 1 to 50"),
        (message("steer", num_inference_steps=True), "from 1 to 50"),
        (message("back", seconds=-1), "from 0 to"),
        (message("record", on=1), "true or false"),
        (message("timeline", entries=[{"at": 0}]), "at most 100 entries"),
        (message("timeline", entries=[{"at": 0, "prompt": "x"}] * 101), "at most 100 entries"),
        (message("timeline", entries=[{"at": 0, "prompt": "x", "also": 1}]), "at most 100 entries"),
        (message("timeline", entries=["x"]), "at most 100 entries"),
        (message("start", id="1"), "id must be"),
        (message("start", id=-1), "id must be"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(text, said):
    with pytest.raises(Refused, match=said):
        parse(text)


def test_a_refusal_repeats_little_and_names_its_message():
    with pytest.raises(Refused) as refused:
        parse(message("steer", id=7, keys="K" * 10_000))
    assert refused.value.id == 7
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        "null",
        "5",
        '"start"',
        "{}",
        '{"type": 5}',
        '{"type": "back", "seconds": NaN}',
        '{"type": "back", "seconds": Infinity}',
        '{"type": "back", "seconds": ' + "9" * 10_000 + "}",
        "[" * 100_000,
        '{"type":' * 30_000,
    ],
)
def test_what_is_no_message_ends_the_talk(text):
    with pytest.raises(Broken) as broken:
        parse(text)
    assert broken.value.code is Close.BAD_MESSAGE


@pytest.mark.parametrize("text", ["x" * (MAX_TEXT_BYTES + 1), "é" * (MAX_TEXT_BYTES // 2 + 1)])
def test_a_message_too_long_is_not_even_read(text):
    with pytest.raises(Broken) as broken:
        parse(text)
    assert broken.value.code is Close.TOO_LARGE


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3)))
def test_no_value_in_any_field_does_worse_than_a_refusal(value):
    for type, field in (("hello", "formats"), ("steer", "keys"), ("timeline", "entries"), ("back", "seconds")):
        with contextlib.suppress(Refused, Broken):
            parse(json.dumps({"type": type, field: value}))


@given(st.binary(max_size=64))
def test_no_bytes_do_worse_than_a_closed_socket(data):
    try:
        captured, image = unpack_camera(data)
    except Broken:
        return
    assert data[0] == 1
    assert image == data[9:]
    assert captured == captured


def test_camera_pictures_have_a_header_and_a_limit():
    assert unpack_camera(struct.pack("<Bd", 1, 12.5) + b"jpeg") == (12.5, b"jpeg")
    for data, code in (
        (b"", Close.BAD_MESSAGE),
        (struct.pack("<Bd", 1, 0.0), Close.BAD_MESSAGE),
        (struct.pack("<Bd", 2, 0.0) + b"x", Close.BAD_MESSAGE),
        (struct.pack("<Bd", 1, float("nan")) + b"x", Close.BAD_MESSAGE),
        (struct.pack("<Bd", 1, 0.0) + bytes(MAX_CAMERA_BYTES), Close.TOO_LARGE),
    ):
        with pytest.raises(Broken) as broken:
            unpack_camera(data)
        assert broken.value.code is code


def test_pictures_and_sound_are_packed_as_documented():
    packed = pack_video(1, 2**32 + 7, 9, 1.5, b"image")
    assert struct.unpack_from("<BBHIQd", packed) == (2, 1, 0, 7, 9, 1.5)
    assert packed[24:] == b"image"
    packed = pack_audio(2, 7, 480, 1.5, 24_000, b"pcm")
    assert struct.unpack_from("<BBHIQdI", packed) == (3, 0, 2, 7, 480, 1.5, 24_000)
    assert packed[28:] == b"pcm"
