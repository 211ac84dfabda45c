"""What a stream notices about its camera: pictures like the last one, and motion."""

import pytest
import torch

from millstream.pipelines.inputs import MOST_SKIPPED, likeness, motion, skip_probability
from millstream.samplers import FlowSampler
from millstream.streaming import Frame


def noisy(count, amount, seed=0):
    """A camera that looks at one thing, with sensor noise."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.rand(3, 32, 48, generator=generator)
    return [
        Frame((still + amount * torch.randn(3, 32, 48, generator=generator)).clamp(0, 1), float(n))
        for n in range(count)
    ]


def drawn(session, frames):
    """Whether each frame was drawn (not given again), and all chunks."""
    was_drawn, chunks = [], []
    for frame in frames:
        before = session.state.frame if session.state else 0
        chunks += session.step(frame)
        was_drawn.append(session.state.frame > before)
    return was_drawn, chunks


def test_likeness_and_the_chance_that_follows_from_it():
    picture = torch.rand(3, 32, 48)
    assert likeness(picture, picture) == pytest.approx(1)
    assert likeness(picture, 1 - picture) == pytest.approx(-1)
    assert likeness(torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)) == pytest.approx(1), "black is like black"
    assert [skip_probability(alike, 0.9) for alike in (-1, 0.9, 0.95, 1.0)] == pytest.approx([0, 0, 0.5, 1])
    assert skip_probability(1.0, 1.0) == 0


def test_a_still_camera_is_drawn_as_rarely_as_the_cap_allows(pipe, seeded):
    session = pipe.stream("a cave", generator=seeded(), strength=0.5, skip_similar=0.9)
    was_drawn, chunks = drawn(session, noisy(3 * MOST_SKIPPED, 0.0))
    assert was_drawn == [n % (MOST_SKIPPED + 1) == 0 for n in range(3 * MOST_SKIPPED)]
    assert [chunk.start for chunk in chunks] == list(range(3 * MOST_SKIPPED)), "and a viewer misses no frame"
    assert [chunk.time for chunk in chunks] == [float(n) for n in range(3 * MOST_SKIPPED)]
    for n in range(1, MOST_SKIPPED + 1):
        assert torch.equal(chunks[n].data, chunks[0].data)
    assert not torch.equal(chunks[MOST_SKIPPED + 1].data, chunks[0].data)


def test_how_much_is_left_out_follows_the_threshold_and_the_seed(pipe, seeded, camera):
    def share(frames, threshold, seed=0):
        with pipe.stream("a cave", generator=seeded(seed), strength=0.5, skip_similar=threshold) as session:
            return drawn(session, frames)[0]

    frames = noisy(40, 0.05)
    some = share(frames, 0.94)
    assert 5 < sum(some) < 35
    assert some == share(frames, 0.94)
    assert some != share(frames, 0.94, seed=1)
    assert sum(share(frames, 0.3)) < sum(some) < sum(share(frames, 0.999)) == 40
    assert all(share(camera(20), 0.9999))


def test_what_is_steered_is_drawn_at_once(pipe, seeded):
    session = pipe.stream("a cave", generator=seeded(), strength=0.5, skip_similar=0.5)
    frames = iter(noisy(100, 0.0))
    changes = [
        {"prompt": "a slime arena"},
        {"strength": 0.6},
        {"guidance_scale": 2.0},
        {"num_inference_steps": 3},
        {"keys": {"KeyW"}},
        {"keys": set(), "mouse": (30.0, 0.0)},
    ]
    drawn(session, [next(frames)])
    for change in changes:
        assert drawn(session, [next(frames)])[0] == [False] if "mouse" not in change else True
        version = session.steer(**change)
        ((was_drawn,), (chunk,)) = drawn(session, [next(frames)])
        assert (was_drawn, chunk.version) == (True, version), change
        while session.control.keys and len(change) == 1:
            assert drawn(session, [next(frames)])[0] == [True], "a held key moves the view"
            break


def test_a_stream_batch_lands_before_it_rests(make, seeded, play, camera):
    session = make(sampler=FlowSampler(3)).stream(
        "a cave", generator=seeded(), strength=0.9, stream_batch=True, skip_similar=0.5
    )
    moving = camera(20)[::4]  # fast enough to be drawn each time
    still = [Frame(moving[-1].data, 40.0 + n) for n in range(5)]
    later = [Frame(1 - moving[-1].data, 50.0 + n) for n in range(1)]
    chunks = play(session, [*moving, *still, *later], flush=True)
    times = [chunk.time for chunk in chunks]
    assert times == [10.0, 14.0, 18.0, 22.0, 26.0, 42.0, 43.0, 44.0, 44.0, 50.0], "44 twice: 50 is on its way"
    assert [chunk.start for chunk in chunks] == list(range(10))
    assert torch.equal(chunks[5].data, chunks[4].data)
    assert torch.equal(chunks[8].data, chunks[4].data)


def test_motion_is_measured_smoothed_and_forgotten():
    still = torch.full((3, 8, 8), 0.5)
    assert motion(still, still, 0.0) == 0
    assert motion(still + 0.05, still, 0.0) == pytest.approx(0.45)
    assert motion(still + 0.4, still, 1.0) == pytest.approx(1.0), "no more than full motion"
    remembered = 1.0
    for _ in range(5):
        remembered = motion(still, still, remembered)
    assert remembered < 1e-4


def test_fast_motion_is_redrawn_less(pipe, seeded, monkeypatch):
    asked = []
    levels = pipe.levels
    monkeypatch.setattr(pipe, "levels", lambda control, strength: asked.append(strength) or levels(control, strength))
    black, white = torch.zeros(3, 32, 48), torch.ones(3, 32, 48)
    session = pipe.stream("a cave", generator=seeded(), strength=0.8, follow_motion=0.5)
    for n, picture in enumerate([black, black, white, white, white]):
        session.step(Frame(picture, float(n)))
    assert asked == pytest.approx([0.8, 0.8, 0.8 * 0.55, 0.8 * 0.955, 0.8 * 0.9955])
    session.steer(strength=0.4)
    session.step(Frame(white, 9.0))
    assert asked[-1] == pytest.approx(0.4, abs=1e-3), "a strength that is steered counts at once"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -0.1}, "strength must be between 0"),
        ({"strength": float("nan")}, "strength must be between 0"),
        ({"strength": "half"}, "strength must be a number between 0 and 1, got 'half'"),
        ({"skip_similar": 1.01}, "skip_similar must be a likeness from 0 to 1, or None, got 1.01"),
        ({"skip_similar": "often"}, "skip_similar must be a likeness"),
        ({"follow_motion": 1}, "follow_motion must be a number from 0 to 0.9, got 1"),
    ],
)
def test_settings_out_of_range_are_refused(pipe, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pipe.stream("a cave", **settings)
