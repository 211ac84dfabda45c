"""Prompts at times, written by hand, saved and replayed."""

from __future__ import annotations

import json

import pytest
import torch

from millstream.pipelines.timeline import Cue, Timeline

CUES = [
    {"at": 0, "prompt": "a corgi surfs"},
    {"at": 1.0, "prompt": "the red fox", "switch": "recache"},
    {"at": 2.0, "prompt": "in the snow", "switch": "cut"},
]


def test_a_replayed_timeline_draws_what_steering_by_hand_draws(make, seeded, tmp_path):
    (tmp_path / "shots.json").write_text(json.dumps(CUES))
    timeline = Timeline.load(tmp_path / "shots.json")
    timeline.save(tmp_path / "again.json")
    assert Timeline.load(tmp_path / "again.json") == timeline
    pipe = make("longlive")
    by_hand = []
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        for number in range(5):
            if number == 2:  # 21 pictures are drawn, 1.3 seconds
                session.steer(prompt="the red fox", switch="recache")
            if number == 3:  # 33 pictures, 2.1 seconds
                session.steer(prompt="in the snow", switch="cut")
            by_hand += [chunk.data for chunk in session.step()]
    frames = sum(len(data) for data in by_hand)
    arguments = {"timeline": timeline, "num_frames": frames, "generator": seeded(), "output_type": "pt"}
    assert torch.equal(pipe(timeline.prompt, **arguments).frames, torch.cat(by_hand))


def test_every_cue_counts(make, seeded):
    """Shots of one prompt, and two cues before one chunk, which begins at picture 21 of 16 a second."""
    cues = [("a corgi surfs", 0), ("a corgi surfs", 0.4), ("the red fox", 1.2), ("in the snow", 1.3)]
    shots = Timeline(tuple(Cue(at, prompt, "keep" if prompt == "in the snow" else "cut") for prompt, at in cues))
    pipe = make("longlive")
    drawn = []
    with pipe.stream(shots.prompt, generator=seeded()) as session:
        for chunks in pipe.drain(session, 40, timeline=shots):
            drawn += [len(chunk.data) for chunk in chunks]
        assert session.state.prompt == "in the snow"
    assert drawn == [9, 9, 12, 9, 12]


@pytest.mark.parametrize(
    ("cues", "message"),
    [
        ([], r"begins at 0 and goes on, got cues at \[\]"),
        (CUES[1:], r"begins at 0 and goes on, got cues at \[1.0, 2.0\]"),
        ([CUES[0], CUES[2], CUES[1]], r"goes on, got cues at \[0, 2.0, 1.0\]"),
        ([{"at": -1, "prompt": "x"}], "seconds from 0 on, got -1"),
        ([{"at": 0, "prompt": "x", "switch": "fade"}], "switch must be keep, recache, lerp or cut, got 'fade'"),
        ([{"at": 0}], r"cue 0 must be \{.*\}, got \{'at': 0\}"),
        ([{"at": 0, "prompt": "x", "colour": 1}], "cue 0 must be"),
        ([CUES[0], {"at": 1, "prompt": 7}], "cue 1: prompt must be a string, got int"),
        ([CUES[0], {"at": "1", "prompt": "x"}], "cue 1: a cue's time must be seconds from 0 on, got '1'"),
        ([CUES[0], {"at": 1, "prompt": "\ud83d"}], "cue 1: the prompt holds half a character"),
        ([{"at": False, "prompt": "x"}], "cue 0: a cue's time must be seconds from 0 on, got False"),
    ],
)
def test_what_is_no_timeline_is_refused(cues, message):
    with pytest.raises(ValueError, match=message):
        Timeline.of(cues)


def test_files_that_are_no_timelines_are_refused(tmp_path):
    path = tmp_path / "shots.json"
    for text, message in (
        ("{", "is no JSON"),
        ('{"at": 0}', "must hold a list of cues, got a dict"),
        ("[" * 200_000, "shots.json is nested too deeply"),
        ('[{"at": 0, "prompt": "x"}, {"at": 1, "prompt": 7}]', "shots.json: cue 1: prompt must be a string"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            Timeline.load(path)
    with pytest.raises(TypeError, match="prompt must be a string, got int"):
        Cue(0, 5)
