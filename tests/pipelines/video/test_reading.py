"""A slow text encoder holds up whoever steers, and no step of any session."""

from __future__ import annotations

from threading import Event, Thread, current_thread
from threading import enumerate as enumerate_threads

import pytest

from millstream.pipelines.timeline import Timeline


class Slow:
    """A text encoder's hook: counts what is read, and by whom, and holds prompts of `length` tokens up."""

    def __init__(self, pipe):
        self.length, self.begun, self.released, self.readers = 0, Event(), Event(), []
        pipe.text_encoder.register_forward_pre_hook(self)

    def __call__(self, module, given):
        self.readers.append(current_thread())
        if given[0].shape[1] == self.length:
            self.begun.set()
            assert self.released.wait(60), "somebody who should not waits for the prompt"


@pytest.fixture
def slow(pipe):
    return Slow(pipe)


def in_thread(what, **arguments):
    thread = Thread(target=what, kwargs=arguments)
    thread.start()
    return thread


def test_no_session_waits_for_a_prompt_that_another_thread_reads(pipe, slow, seeded):
    slow.length = 4
    with pipe.stream("a corgi", generator=seeded()) as session, pipe.stream("a fox", generator=seeded(1)) as other:
        steering = in_thread(session.steer, prompt="the red fox")
        assert slow.begun.wait(60)
        assert other.step()[0].version == 0
        assert session.step()[0].version == 0, "nor does the one that is steered"
        other.steer(prompt="a corgi")  # known already
        assert other.step()[0].version == 1
        slow.released.set()
        steering.join()
        count = len(slow.readers)
        assert session.step()[0].version == 1
        assert session.state.prompt == "the red fox"
        assert len(slow.readers) == count, "the step found it read"


def test_a_prompt_that_was_forgotten_is_read_again_before_the_step_takes_its_turn(pipe, slow, seeded):
    with pipe.stream("a corgi", generator=seeded()) as session, pipe.stream("a fox", generator=seeded(1)) as other:
        session.step()
        other.step()
        session.steer(prompt="the red fox")
        for number in range(40):
            pipe.read_prompt(f"a corgi {number}")
        slow.length, known = 4, len(slow.readers)
        stepping = in_thread(session.step)
        assert slow.begun.wait(60)
        assert other.step()
        slow.released.set()
        stepping.join()
        assert len(slow.readers) == known + 1
        assert session.state.prompt == "the red fox"


def test_more_streams_than_prompts_are_kept_read_theirs_once(pipe, slow, seeded):
    sessions = [pipe.stream(f"a fox {number}", generator=seeded(number)) for number in range(3)]
    for session in sessions:
        session.step()
    for number in range(40):
        pipe.read_prompt(f"a corgi {number}")
    count = len(slow.readers)
    for session in sessions:
        session.step()
        session.steer(switch="recache")
        session.step()
        session.close()
    assert len(slow.readers) - count <= 3, "steering may read again, steps do not"
    assert set(slow.readers) == {current_thread()}


def test_a_prompt_that_many_threads_ask_for_is_read_once(pipe, slow):
    slow.length = 4
    threads = [in_thread(pipe.read_prompt, prompt="the red fox") for _ in range(4)]
    assert slow.begun.wait(60)
    slow.released.set()
    for thread in threads:
        thread.join()
    assert len(slow.readers) == 1


def test_a_timeline_reads_a_prompt_before_its_cue_is_due(pipe, slow, seeded):
    cues = [(0, "a corgi"), (0.5, "the red fox"), (1.2, "a fox in the snow")]
    timeline = Timeline.of([{"at": at, "prompt": prompt} for at, prompt in cues])
    with pipe.stream("a corgi", generator=seeded()) as session:
        follow, prompts = timeline.follow(session), []
        for seconds in (0.0, 0.6, 1.3):
            wait_until_read()
            follow(seconds)
            session.step()
            prompts.append(session.state.prompt)
    assert prompts == [prompt for _, prompt in cues]
    assert [thread is current_thread() for thread in slow.readers] == [True, False, False]


def wait_until_read():
    for thread in enumerate_threads():
        if thread.name == "timeline":
            thread.join(60)


def test_a_clip_of_a_timeline_reads_no_cue_twice(pipe, slow, seeded):
    timeline = Timeline.of([{"at": number / 4, "prompt": f"a fox {'sea ' * number}"} for number in range(4)])
    pipe(timeline.prompt, timeline=timeline, num_frames=21, generator=seeded(), output_type="pt")
    wait_until_read()
    assert len(slow.readers) == 4


def test_a_dropped_encoder_holds_nobody_up_and_refuses_where_it_is_asked(pipe, seeded):
    pipe.encode_prompt("the red fox")
    with pipe.stream("a corgi", generator=seeded()) as session:
        pipe.drop_text_encoder()
        session.step()
        session.steer(prompt="the red fox")
        session.step()
        assert session.state.prompt == "the red fox"
        timeline = Timeline.of([{"at": 0, "prompt": "a corgi"}, {"at": 1, "prompt": "snow"}])
        follow = timeline.follow(session)
        wait_until_read()
        session.step()
        with pytest.raises(ValueError, match="no text encoder to read 'snow'"):
            follow(2.0)
