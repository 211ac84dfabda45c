"""Several frames of one stream in one pass: the same frames as one after the other, later, and none is lost."""

import pytest
import torch

from millstream.samplers import FlowSampler
from millstream.streaming import Snapshot, step_together


def pictures(chunks):
    return torch.cat([chunk.data for chunk in chunks])


def near(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ["euler", "renoise"])
def test_without_memory_it_is_the_frames_drawn_one_by_one(make, seeded, rule, camera, play):
    drawn = []
    for batched in (False, True):
        pipe = make(sampler=FlowSampler(3, rule=rule), window=1)
        with pipe.stream("a cave", generator=seeded(), strength=0.9, stream_batch=batched) as session:
            drawn.append(play(session, camera(7), flush=True))
    near(pictures(drawn[1]), pictures(drawn[0]))
    assert [c.time for c in drawn[1]] == [c.time for c in drawn[0]]
    assert [c.start for c in drawn[1]] == list(range(7))


def test_with_memory_it_is_one_call_after_the_other_over_a_memory_per_level(make, seeded, camera):
    """The reference walks frame by frame through all levels; the stream batch goes through them on the diagonal."""
    frames = camera(9)
    script = {2: {"keys": {"KeyW"}}, 4: {"prompt": "a slime arena"}, 5: {"guidance_scale": 2.0}, 6: {"strength": 0.75}}

    def run(pipe, one_by_one):
        session = pipe.stream("a cave", generator=seeded(), strength=0.9, stream_batch=True)
        chunks, passes, move = [], [], pipe._move

        def recorded(flying):
            passes.append(len(flying))
            move(flying)

        pipe._move = recorded
        for n, frame in enumerate(frames):
            if n in script:
                session.steer(**script[n])
            chunks += session.step(frame)
            while one_by_one and session.state.flight.frames:
                chunks += [chunk for _, chunk in torch.no_grad()(pipe.tick)([session.state])]
        return chunks + list(session.flush()), passes

    (expected, single), (chunks, batched) = (
        run(make(sampler=FlowSampler(3, rule="renoise")), one_by_one) for one_by_one in (True, False)
    )
    assert single == [1] * 27
    assert batched == [1, 2, *[3] * 7, 2, 1]
    near(pictures(chunks), pictures(expected))
    assert [c.version for c in chunks] == [c.version for c in expected] == [0, 0, 1, 1, 2, 3, 4, 4, 4]
    assert [c.time for c in chunks] == [f.time for f in frames]


def test_a_step_gives_the_frame_that_came_two_steps_before(make, seeded, camera):
    session = make(sampler=FlowSampler(3)).stream("a cave", generator=seeded(), strength=1.0, stream_batch=True)
    times = [[chunk.time for chunk in session.step(frame)] for frame in camera(6)]
    assert times == [[], [], [10.0], [11.0], [12.0], [13.0]]
    assert [chunk.time for chunk in session.flush()] == [14.0, 15.0]
    assert list(session.flush()) == []


def test_many_cameras_share_one_pass(make, seeded, camera, play):
    pipe = make(sampler=FlowSampler(3, rule="renoise"))
    settings = [{"strength": 0.9}, {"strength": 0.5}, {"strength": 0.8, "guidance_scale": 3.0}]
    inputs = [camera(7, seed=n) for n in range(3)]

    def opened(pipe, n):
        return pipe.stream(f"cave {n}", generator=seeded(n), stream_batch=True, **settings[n])

    sessions = [opened(pipe, n) for n in range(3)]
    together = [step_together(sessions, list(frames)) for frames in zip(*inputs)]
    assert pipe.arena.in_use == 3 + 2 + 3
    for n, session in enumerate(sessions):
        chunks = [chunk for step in together for chunk in step[n]] + list(session.flush())
        with opened(make(sampler=FlowSampler(3, rule="renoise")), n) as alone:
            near(pictures(chunks), pictures(play(alone, inputs[n], flush=True)))
    assert pipe.arena.in_use == 3
    for session in sessions:
        session.close()
    assert pipe.arena.in_use == 0


@pytest.mark.parametrize(
    "change",
    [{"stream_batch": False}, {"strength": 0.3}, {"strength": None}, {"num_inference_steps": 2}, None],
    ids=["off", "fewer steps by strength", "true frames", "fewer steps", "no picture"],
)
def test_what_ends_a_stream_batch_loses_no_frame(make, seeded, change, camera, play):
    pipe = make(sampler=FlowSampler(3))
    session = pipe.stream("a cave", generator=seeded(), strength=0.9, stream_batch=True)
    frames = camera(8)
    chunks = play(session, frames[:4])
    if change is None:
        chunks += session.step()
    else:
        session.steer(**change)
    chunks += play(session, frames[4:], flush=True)
    assert [chunk.start for chunk in chunks] == list(range(9 if change is None else 8))
    assert [c.time for c in chunks if c.time < 100] == [frame.time for frame in frames]
    assert pictures(chunks).isfinite().all()
    assert pipe.arena.in_use == 1


@pytest.mark.parametrize("at", [1, 2, 6])
def test_a_snapshot_holds_the_frames_in_flight(make, seeded, tmp_path, at, camera, play):
    frames = camera(10)
    session = make(sampler=FlowSampler(3, rule="renoise"), sinks=1).stream(
        "a cave", generator=seeded(), strength=0.9, stream_batch=True
    )
    play(session, frames[: at - 1])
    session.steer(prompt="a slime arena")
    play(session, frames[at - 1 : at])
    path = session.snapshot().save(tmp_path / "here.safetensors")
    fork = session.fork()
    expected = pictures(play(session, frames[at:], flush=True))
    other = make(sampler=FlowSampler(3, rule="renoise"), sinks=1).stream("elsewhere")
    other.restore(Snapshot.load(path))
    near(pictures(play(other, frames[at:], flush=True)), expected)
    near(pictures(play(fork, frames[at:], flush=True)), expected)


def test_a_snapshot_of_a_stream_batch_that_rests_keeps_its_memories(make, seeded, play, camera):
    pipe = make(sampler=FlowSampler(3, rule="renoise"))
    session = pipe.stream("a cave", generator=seeded(), strength=0.9, stream_batch=True, skip_similar=0.5)
    moving = camera(40)[::4]
    play(session, [*moving[:5], *[moving[4]] * 4])
    assert session.state.flight.frames == []
    saved = session.snapshot()
    expected = pictures(play(session, moving[5:], flush=True))
    session.restore(saved)
    assert pipe.arena.in_use == 3
    near(pictures(play(session, moving[5:], flush=True)), expected)
    session.close()
    assert pipe.arena.in_use == 0


@pytest.mark.parametrize("damage", ["level", "step", "sigmas", "frame"])
def test_a_damaged_snapshot_of_a_stream_batch_is_refused(make, seeded, damage, camera, play):
    pipe = make(sampler=FlowSampler(3))
    session = pipe.stream("a cave", generator=seeded(), strength=0.9, stream_batch=True)
    frames = camera(6)
    play(session, frames[:3])
    snapshot = session.snapshot()
    leaves = dict(snapshot.leaves)
    if damage == "level":
        leaves = {name: leaf for name, leaf in leaves.items() if not name.startswith("level1")}
    elif damage == "step":
        leaves["flight0.step"] = 0
    elif damage == "sigmas":
        leaves["flight0.sigmas"] = leaves["flight0.sigmas"][:2]
    else:
        del leaves["flight1.latents"]
    with pytest.raises(ValueError, match="snapshot"):
        session.restore(Snapshot(leaves, snapshot.control, snapshot.unread, snapshot.kind))
    assert pipe.arena.in_use == 3
    assert len(play(session, frames[3:], flush=True)) == 5, "the session goes on"


@pytest.mark.parametrize("rule", ["heun", "unipc"])
def test_rules_with_a_memory_are_refused(make, rule):
    pipe = make(sampler=FlowSampler(3, rule=rule))
    with pytest.raises(ValueError, match=f"needs a sampler whose rule is euler or renoise, this one's is '{rule}'"):
        pipe.stream("a cave", stream_batch=True)
    with pytest.raises(TypeError, match="stream_batch must be True or False, got 3"):
        pipe.stream("a cave", stream_batch=3)
