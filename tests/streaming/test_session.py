import gc
import itertools
import threading
import time

import pytest
import torch

from millstream.streaming import Session, WorldControl, step_together


def frames(session, count):
    return torch.stack(list(itertools.islice(session, count)))


def test_nothing_is_computed_before_the_first_frame(toy):
    pipeline = toy()
    stream = iter(Session(pipeline, WorldControl()))
    assert (pipeline.live_states, pipeline.advances) == (0, [])
    assert next(stream).shape == (3, 8, 10)
    assert pipeline.advances == [1]
    next(stream)
    assert pipeline.advances == [1], "the second frame of a chunk needs no step"


def test_same_seed_and_controls_give_the_same_frames(toy, seeded):
    one, same, other = (Session(toy(), WorldControl("a"), generator=seeded(seed)) for seed in (1, 1, 2))
    drawn = frames(one, 9)
    assert torch.equal(drawn, frames(same, 9))
    assert not torch.equal(drawn, frames(other, 9))


def test_chunks_say_where_they_stand_and_under_which_control(toy):
    session = Session(toy(), WorldControl())
    chunks = session.chunks()
    assert next(chunks).version == 0
    assert session.steer(prompt="an ice cave") == 1
    assert session.applied == 0, "steered, but no step has read it"
    second = next(chunks)
    assert (second.start, second.version, session.applied) == (2, 1, 1)
    assert session.control.prompt == "an ice cave"


def test_movement_adds_up_until_a_step_reads_it_and_is_read_once(toy):
    pipeline = toy()
    session = Session(pipeline, WorldControl())
    session.steer(mouse=(3, 1))
    session.steer(prompt="elsewhere")
    session.steer(mouse=(4, -2))
    session.step()
    session.step()
    assert [control.mouse for control in pipeline.read] == [(7.0, -1.0), (0.0, 0.0)]


def test_a_tap_between_steps_counts_once_and_a_held_key_stays_down(toy):
    pipeline = toy()
    session = Session(pipeline, WorldControl())
    session.steer(keys={"KeyW"})
    session.steer(keys={"KeyW", "Space"})
    session.steer(keys={"KeyW"})
    session.step()
    session.step()
    session.steer(keys=set())
    session.step()
    assert [sorted(control.keys) for control in pipeline.read] == [["KeyW", "Space"], ["KeyW"], []]


def test_a_script_of_keys_is_played_key_by_key(toy):
    pipeline = toy(chunk=1)
    session = Session(pipeline, WorldControl())
    script = ["KeyW", "KeyA", "KeyW"]
    for key in script:
        session.steer(keys={key})
        session.step()
    assert [set(control.keys) for control in pipeline.read] == [{key} for key in script]


def test_a_bad_control_changes_nothing(toy):
    session = Session(toy(), WorldControl("a cave"))
    session.steer(keys={"KeyW"})
    before = session.control
    for bad in ({"prompt": 5}, {"mouse": "left"}, {"colour": "red"}, {"prompt": "x" * 10_000, "keys": {"KeyA"}}):
        with pytest.raises((TypeError, ValueError)):
            session.steer(**bad)
    assert session.control == before
    assert session.steer(prompt="on we go") == before.version + 1
    session.step()


def test_steering_does_not_wait_for_a_step(toy):
    session = Session(toy(delay=0.3), WorldControl())
    thread = threading.Thread(target=session.step)
    thread.start()
    time.sleep(0.05)
    start = time.monotonic()
    session.steer(keys={"KeyW"})
    assert time.monotonic() - start < 0.1
    thread.join()
    assert session.applied == 0


def test_a_second_stepping_thread_is_refused_and_harms_nothing(toy):
    session = Session(toy(delay=0.3), WorldControl())
    thread = threading.Thread(target=session.step)
    thread.start()
    time.sleep(0.05)
    with pytest.raises(RuntimeError, match="another thread is stepping this session"):
        session.step()
    thread.join()
    assert session.step()[0].start == 2


def test_a_snapshot_from_another_thread_waits_instead_of_stopping_the_stream(toy):
    session = Session(toy(delay=0.005), WorldControl())
    taken = []

    def keep():
        for _ in range(10):
            taken.append(session.snapshot().leaves["index"])

    thread = threading.Thread(target=keep)
    thread.start()
    for _ in range(30):
        session.step()
    thread.join()
    assert len(taken) == 10
    assert taken == sorted(taken)


def test_steering_from_many_threads_loses_no_movement(toy):
    pipeline = toy()
    session = Session(pipeline, WorldControl())

    def push():
        for _ in range(200):
            session.steer(mouse=(1, 0))

    threads = [threading.Thread(target=push) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        session.step()
    session.step()
    assert sum(control.mouse[0] for control in pipeline.read) == 800
    assert session.control.version == 800


def test_sessions_stepped_together_equal_each_alone(toy, seeded):
    def opened(pipeline):
        return [Session(pipeline, WorldControl(prompt), generator=seeded(n)) for n, prompt in enumerate(("a", "bb"))]

    shared = toy()
    together, alone = opened(shared), opened(toy())
    for step in range(5):
        for pair in (together, alone):
            pair[step % 2].steer(mouse=(step, 1), keys={"KeyW"})
        both = step_together(together)
        for chunks, session in zip(both, alone, strict=True):
            assert torch.equal(chunks[0].data, session.step()[0].data)
    assert shared.advances == [2] * 5
    assert [session.applied for session in together] == [session.applied for session in alone]


def test_stepping_together_refuses_what_cannot_be(toy):
    pipeline = toy()
    one, two, stranger = (Session(p, WorldControl()) for p in (pipeline, pipeline, toy()))
    with pytest.raises(ValueError, match="different pipelines"):
        step_together([one, stranger])
    with pytest.raises(ValueError, match="in the list twice"):
        step_together([one, one])
    with pytest.raises(ValueError, match="got 1 media for 2 sessions"):
        step_together([one, two], [None])
    two.close()
    with pytest.raises(RuntimeError, match="closed"):
        step_together([one, two])
    assert one.step()[0].start == 0, "the refusals moved nobody"
    assert step_together([]) == []


def test_restore_goes_on_with_the_same_frames(toy, seeded):
    session = Session(toy(), WorldControl("a"), generator=seeded())
    frames(session, 5)
    session.steer(keys={"KeyW"}, mouse=(5, 5))
    snapshot = session.snapshot()
    first = frames(session, 6)
    assert not torch.equal(frames(session, 6), first)
    session.restore(snapshot)
    assert torch.equal(frames(session, 6), first), "unread movement is part of the snapshot"


def test_versions_only_rise(toy):
    session = Session(toy(), WorldControl())
    session.steer(prompt="first")
    snapshot = session.snapshot()
    session.steer(prompt="second")
    session.restore(snapshot)
    assert (session.control.prompt, session.control.version) == ("first", 3)
    assert session.step()[0].version == 3
    session.restore(session.snapshot())
    assert session.control.version == 3, "nothing has changed"


def test_restoring_what_does_not_fit_leaves_the_session_as_it_was(toy, seeded):
    session, twin = (Session(toy(), WorldControl("a"), generator=seeded()) for _ in range(2))
    frames(session, 2), frames(twin, 2)
    good = session.snapshot()
    for field, value, message in (
        ("leaves", {"weights": torch.zeros(1)}, "not the leaves of a toy"),
        ("kind", "VideoControl", "holds a VideoControl, this session is steered by a WorldControl"),
        ("control", {"prompt": 3}, "control is not valid: prompt must be a string"),
    ):
        contents = {name: getattr(good, name) for name in ("leaves", "control", "unread", "kind")}
        with pytest.raises(ValueError, match=message):
            session.restore(type(good)(**(contents | {field: value})))
    assert torch.equal(frames(session, 4), frames(twin, 4))


def test_a_fork_goes_its_own_way_from_the_same_place(toy, seeded):
    session = Session(toy(), WorldControl("a"), generator=seeded())
    frames(session, 4)
    fork = session.fork()
    assert torch.equal(frames(session, 4), frames(fork, 4))
    fork.steer(prompt="somewhere else entirely")
    assert not torch.equal(frames(session, 4), frames(fork, 4))
    assert session.control.prompt == "a"
    session.reset(), fork.reset()
    session.steer(prompt="b"), fork.steer(prompt="b")
    assert torch.equal(frames(session, 4), frames(fork, 4)), "even the seeds to come are the same"


def test_reset_begins_anew_with_the_next_seed_and_keeps_the_control(toy, seeded):
    pipeline = toy()
    session = Session(pipeline, WorldControl(), generator=seeded())
    session.steer(prompt="kept")
    first = frames(session, 4)
    session.reset()
    assert session.step()[0].start == 0
    assert pipeline.live_states == 1
    assert pipeline.read[-1].prompt == "kept"
    again = Session(toy(), WorldControl("kept"), generator=seeded())
    assert torch.equal(frames(again, 4), first)


def test_close_gives_the_rows_back_once(toy):
    pipeline = toy()
    with Session(pipeline, WorldControl()) as session:
        session.step()
        assert pipeline.live_states == 1
    session.close()
    assert pipeline.live_states == 0
    for action in (session.step, session.snapshot, session.reset, session.flush, session.fork):
        with pytest.raises(RuntimeError, match="this session is closed"):
            action()


def test_iteration_ends_when_the_session_is_closed(toy):
    session = Session(toy(), WorldControl())
    seen = 0
    for _ in session:
        seen += 1
        if seen == 5:
            session.close()
    assert seen == 6, "the chunk that was drawn is played out"
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(session))


def test_a_forgotten_session_gives_its_rows_back(toy):
    pipeline = toy()
    session = Session(pipeline, WorldControl())
    session.step()
    del session
    gc.collect()
    assert pipeline.live_states == 0


def test_a_failed_step_leaves_the_session_usable(toy, monkeypatch):
    pipeline = toy()
    session = Session(pipeline, WorldControl())
    session.step()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "advance", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.step()
    assert session.step()[0].start == 2


def test_metrics_count_what_was_drawn(toy):
    session = Session(toy(delay=0.01), WorldControl())
    session.steer(prompt="x")
    for _ in range(10):
        session.step()
    figures = session.metrics.as_dict()
    assert (figures["frames"], figures["steps"], figures["applied"]) == (20, 10, 1)
    assert 0.01 <= figures["step_p50"] < 0.1
    assert figures["time_to_first_frame"] >= 0.01
    assert 20 < figures["fps"] <= 200


def test_a_snapshot_whose_controls_the_pipeline_refuses_is_not_restored(toy, seeded):
    session = Session(toy(), WorldControl("allowed"), generator=seeded())
    before = session.step()[0].data
    session.reset()
    snapshot = session.snapshot()
    snapshot.control["prompt"] = "forbidden"
    with pytest.raises(ValueError, match="nothing forbidden"):
        session.restore(snapshot)
    assert session.control.prompt == "allowed"
    assert session.step()[0].data.shape == before.shape
