"""Snapshots of another pipeline, and damaged ones: refused by name, before anything is taken or changed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from millstream.models.tiny_vae import TinyVideoDecoder
from millstream.pipelines.recipes import RECIPES
from millstream.streaming.snapshot import Snapshot


def saved_by(pipe, seeded, steps=2, **settings):
    with pipe.stream("a corgi", generator=seeded(), **settings) as session:
        for _ in range(steps):
            session.step()
        return session.snapshot()


def changed(snapshot, **leaves):
    kept = {name: value for name, value in (snapshot.leaves | leaves).items() if value is not None}
    return Snapshot(kept, snapshot.control, None, snapshot.kind)


def refuses(session, snapshot, message):
    with pytest.raises(ValueError, match=message) as told:
        session.restore(snapshot)
    assert "\n" not in str(told.value)


def test_another_pipelines_snapshot_is_refused_by_what_differs(make, seeded):
    pipe = make("longlive")
    wider = replace(RECIPES["longlive"], blend=9)
    tiny = TinyVideoDecoder(4, 1, (12, 10, 8, 6)).eval()
    for other, message in (
        (make("krea"), "with recipe 'krea', this pipeline has 'longlive'; restore it in a pipeline like"),
        (make("self_forcing"), "with recipe 'self_forcing'"),
        (make("longlive_unbounded"), "with recipe 'longlive_unbounded'"),
        (make(wider), "with blend of the recipe 9, this pipeline has 4"),
        (make("longlive", preset="fast"), "with preset 'fast', this pipeline has 'exact'"),
        (make("longlive", preset="small"), "with preset 'small'"),
        (make("longlive", size=(32, 16)), "with size '32 x 16', this pipeline has '16 x 32'"),
        (make("longlive", decoder=tiny), "with decoder 'TinyVideoDecoder', this pipeline has 'WanDecoder'"),
        (make("longlive", text_length=6), "with text_length 6, this pipeline has 8"),
    ):
        foreign = saved_by(other, seeded)
        with pipe.stream("a corgi", generator=seeded()) as session:
            session.step()
            refuses(session, foreign, message)
            assert pipe.arena.cache.rows == 1, "refused before memory is taken for it"
            assert session.step()[0].start == 9, "the stream goes on"


def test_an_older_snapshot_that_does_not_say_who_made_it_is_told_by_its_shapes(make, seeded):
    pipe = make("longlive")
    mine, wide = saved_by(pipe, seeded), saved_by(make("longlive", size=(16, 64)), seeded)
    with pipe.stream("a corgi", generator=seeded()) as session:
        refuses(session, changed(wide, made=None), r"history is \[4, 12, 2, 8\] .* this pipeline's is \[4, 12, 2, 4\]")
        refuses(session, changed(saved_by(make("streamdiffusion_v2"), seeded), made=None), "has 2 rows of memory")
        session.restore(changed(mine, made=None))
        assert session.step()[0].start == 21


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"frame": 1.5}, "damaged: frame is a float"),
        ({"frame": -3}, "damaged: frame is -3"),
        ({"seed": 2**63}, "damaged: seed is 9223372036854775808"),
        ({"motion": math.nan}, "damaged: motion is nan"),
        ({"pending": "fade"}, "damaged: pending is 'fade'"),
        ({"rows": 2}, "has 2 rows of memory, this pipeline's recipe has 1"),
        ({"made": "{"}, "damaged: it does not say which pipeline made it"),
        ({"made": 7}, "damaged: it does not say which pipeline made it"),
        ({"history": torch.zeros(4, 12, 2)}, r"history is \[4, 12, 2\]"),
        ({"text": torch.zeros(5, 16)}, r"text is \[5, 16\] in torch.float32, this pipeline's is \[8, 16\] in floats"),
        ({"text": torch.zeros(8, 16, dtype=torch.int32)}, "in torch.int32"),
        ({"text": None}, "damaged: it lacks what its prompt is"),
        ({"target": torch.zeros(8, 16)}, "of which one is missing"),
        ({"blend": 2}, "damaged: 2 steps between two prompts"),
        ({"flying": torch.zeros(4, 3, 2, 4), "versions": torch.zeros(1, dtype=torch.int64)}, "3 frames are under way"),
        ({"waiting": torch.zeros(4, 3, 2, 4)}, "3 frames wait for a chunk of 3"),
        ({"corner": torch.zeros(3, 8, 8)}, r"corner is \[3, 8, 8\]"),
        ({"memory.0.k": None}, "row 0 of its memory is incomplete"),
        ({"memory.0.k": torch.zeros(2, 2)}, "the saved k has shape"),
        ({"memory.0.count": "three"}, "count of row 0 of its memory is 'three'"),
        ({"memory.0.reached": -1}, "reached of row 0 of its memory is -1"),
        ({"decoding.frames": None}, "the saved codec state has frames = None"),
        ({"decoding.conv_in": None}, "the saved codec state has conv_in = None"),
        ({"history": None}, "not the snapshot of a video stream"),
        ({"colour": 1}, "not the snapshot of a video stream"),
    ],
)
def test_a_damaged_snapshot_is_refused_and_the_stream_goes_on(pipe, seeded, leaves, message):
    snapshot = saved_by(pipe, seeded)
    with pipe.stream("a corgi", generator=seeded()) as session:
        session.step()
        refuses(session, changed(snapshot, **leaves), message)
        assert pipe.arena.in_use == 1, "no row is lost"
        assert session.step()[0].start == 9


@pytest.mark.parametrize("name", ["rolling_forcing", "streamdiffusion_v2"])
def test_what_is_under_way_must_fit_the_steps_that_were_taken(make, seeded, name):
    pipe = make(name)
    for steps in range(7):
        snapshot = saved_by(pipe, seeded, steps)
        with pipe.stream("a fox", generator=seeded(2)) as session:
            session.restore(snapshot)
            session.step()
            if steps > 1:
                refuses(session, changed(snapshot, flying=None), "0 frames are under way after")
                refuses(session, changed(snapshot, versions=torch.zeros(9, dtype=torch.int64)), "are under way after")
