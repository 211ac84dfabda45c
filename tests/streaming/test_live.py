import signal
import threading
import time

import pytest
import torch

from millstream.streaming import Chunk, EndOfStream, Frame, Session, WorldControl, live


class FakeSource:
    """Gives frame n (of brightness n / 1000) when it is due, as a camera of `rate` would."""

    def __init__(self, rate=200.0, frames=10_000, error=None):
        self.rate, self.frames, self.error = rate, frames, error
        self.given = self.closed = 0
        self.start = None

    def read(self):
        now = time.monotonic()
        self.start = self.start or now
        if now < self.start + self.given / self.rate:
            return None
        if self.given == self.frames:
            raise self.error or EndOfStream
        self.given += 1
        return Frame(torch.full((3, 8, 10), self.given / 1000), now)

    def close(self):
        self.closed += 1


class FakeSink:
    def __init__(self, delay=0.0, on_write=lambda count: None):
        self.delay, self.on_write = delay, on_write
        self.chunks, self.times, self.ages = [], [], []
        self.closed = 0
        self.thread = None

    def write(self, chunk):
        time.sleep(self.delay)
        self.on_write(len(self.chunks))
        self.thread = threading.current_thread()
        self.chunks.append(chunk)
        self.times.append(time.monotonic())
        self.ages.append(time.monotonic() - chunk.time)

    def close(self):
        self.closed += 1


@pytest.fixture(autouse=True)
def no_thread_stays_behind():
    yield
    deadline = time.monotonic() + 2
    while names := [thread.name for thread in threading.enumerate() if thread.name.startswith("millstream-")]:
        assert time.monotonic() < deadline, f"still running: {names}"
        time.sleep(0.01)


def open_session(toy, **options):
    pipeline = toy(**options)
    return pipeline, Session(pipeline, WorldControl())


def test_a_camera_faster_than_the_model_builds_no_queue(toy):
    pipeline, session = open_session(toy, delay=0.03)
    source, sink = FakeSource(rate=300), FakeSink()
    metrics = live(source, session, sink, until=0.6)
    answered = pipeline.answered
    late = sink.ages[-6:-1]  # the last chunk is the codec's, of no input
    assert sorted(late)[2] < 0.1, f"frames grew old: {late}"
    assert metrics.dropped > source.given / 2
    assert metrics.dropped + metrics.steps <= source.given <= metrics.dropped + metrics.steps + 2
    assert answered == sorted(set(answered)), "no frame twice, none out of order"
    assert metrics.frame_age < 0.1
    assert (source.closed, sink.closed, metrics.ended) == (1, 1, "until")


def test_a_slow_sink_makes_drops_not_age(toy):
    _, session = open_session(toy)
    source, sink = FakeSource(rate=200), FakeSink(delay=0.05)
    metrics = live(source, session, sink, until=0.6)
    assert metrics.dropped > 60
    assert sink.ages[-2] < 0.3


def test_the_end_of_the_source_flushes_and_closes(toy):
    pipeline, session = open_session(toy)
    source, sink = FakeSource(rate=50, frames=5), FakeSink()
    metrics = live(source, session, sink)
    assert pipeline.answered[-1] == pytest.approx(0.005), "the last frame is answered too"
    assert sink.chunks[-1].data.min() == 1, "the codec's last frames came out"
    assert [chunk.start for chunk in sink.chunks] == [2 * n for n in range(len(sink.chunks))]
    assert (source.closed, sink.closed, metrics.ended) == (1, 1, "source")
    assert session.step(), "the session stays open"


def test_without_a_source_the_stream_runs_at_its_own_rate(toy):
    _, session = open_session(toy, chunk=2)
    sink = FakeSink()
    live(None, session, sink, until=0.7)
    gaps = sorted(later - sooner for sooner, later in zip(sink.times[1:-1], sink.times[2:-1], strict=False))
    assert 6 <= len(sink.chunks) <= 10, "20 frames/s in chunks of two, and the codec's last"
    assert gaps[len(gaps) // 2] == pytest.approx(0.1, abs=0.03)


def test_a_model_slower_than_the_rate_runs_as_fast_as_it_can(toy):
    _, session = open_session(toy, chunk=1, delay=0.08)
    metrics = live(None, session, FakeSink(), until=0.6)
    assert metrics.fps == pytest.approx(12, abs=3)


def test_steering_shows_within_a_step_or_two(toy):
    _, session = open_session(toy, chunk=1)

    def steer_at_five(count):
        if count == 5:
            session.steer(prompt="now")

    sink = FakeSink(on_write=steer_at_five)
    live(None, session, sink, until=lambda: len(sink.chunks) > 10)
    assert [chunk.version for chunk in sink.chunks].index(1) <= 7


def test_the_sink_runs_where_the_caller_is_and_may_end_the_stream(toy):
    def press_escape(count):
        if count == 3:
            raise EndOfStream

    _, session = open_session(toy)
    source, sink = FakeSource(), FakeSink(on_write=press_escape)
    metrics = live(source, session, sink)
    assert sink.thread is threading.main_thread()
    assert (len(sink.chunks), source.closed, sink.closed, metrics.ended) == (3, 1, 1, "sink")


def press_ctrl_c():
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@pytest.mark.parametrize("during", ["write", "wait"])
def test_ctrl_c_ends_in_good_order(toy, during):
    _, session = open_session(toy)
    pressed = iter([False, False, True])
    source = FakeSource(rate=200 if during == "write" else 5)
    sink = FakeSink(on_write=lambda _: during == "write" and next(pressed, False) and press_ctrl_c())
    if during == "wait":
        threading.Timer(0.3, press_ctrl_c).start()
    metrics = live(source, session, sink)
    assert sink.chunks[-1].data.min() == 1, "flushed"
    assert (source.closed, sink.closed, metrics.ended) == (1, 1, "interrupt")


def test_a_second_ctrl_c_does_not_wait_for_good_order(toy):
    _, session = open_session(toy)
    source, sink = FakeSource(), FakeSink(on_write=lambda _: press_ctrl_c())
    with pytest.raises(KeyboardInterrupt):
        live(source, session, sink)
    assert (source.closed, sink.closed) == (1, 1)


@pytest.mark.parametrize("culprit", ["source", "session", "sink", "until", "close"])
def test_an_error_anywhere_reaches_the_caller_and_everything_is_closed(toy, culprit):
    pipeline, session = open_session(toy)
    source, sink, until = FakeSource(), FakeSink(), None

    def fail(*_):
        sink.closed += culprit == "close"
        raise ZeroDivisionError(f"the {culprit} broke")

    if culprit == "source":
        source = FakeSource(frames=5, error=ZeroDivisionError("the source broke"))
    elif culprit == "session":
        pipeline.advance = fail
    elif culprit == "sink":
        sink.on_write = fail
    elif culprit == "until":
        until = fail
    else:
        sink.close, until = fail, 0.2
    with pytest.raises(ZeroDivisionError, match=f"the {culprit} broke"):
        live(source, session, sink, until=until)
    assert (source.closed, sink.closed) == (1, 1)


def test_the_cause_is_raised_not_its_consequence(toy):
    pipeline, session = open_session(toy)
    pipeline.advance = lambda *_: 1 / 0
    sink = FakeSink()
    sink.close = lambda: [].pop()
    with pytest.raises(ZeroDivisionError):
        live(None, session, sink)


@pytest.mark.parametrize("until", [0, -1, float("nan"), "soon"])
def test_a_bad_until_is_refused_and_everything_is_closed(toy, until):
    pipeline, session = open_session(toy)
    source, sink = FakeSource(), FakeSink()
    with pytest.raises(ValueError, match="until must be a positive number of seconds or a callable"):
        live(source, session, sink, until=until)
    assert (source.given, source.closed, sink.closed, pipeline.advances) == (0, 1, 1, [])


def test_a_source_that_gives_nothing_still_obeys_until(toy):
    _, session = open_session(toy)
    source, sink = FakeSource(frames=10_000, rate=1e-6), FakeSink()
    source.given = 1  # the next frame is due in eleven days
    start = time.monotonic()
    live(source, session, sink, until=0.2)
    assert time.monotonic() - start < 1
    assert (sink.chunks, source.closed) == ([], 1)


class Together:
    """A pipeline that answers four pictures in one go, at 20 a second, and takes 0.1 s for it."""

    rate, pictures_per_chunk, size = 20.0, 4, (8, 10)

    def __init__(self):
        self.read, self.waiting = [], []

    def check(self, control): ...

    def begin(self, control, *, generator=None):
        return 0

    def advance(self, states, controls, media):
        (frame,) = media
        self.read.append(frame.time)
        self.waiting.append(frame)
        if len(self.waiting) < 4:
            return [[]]
        time.sleep(0.1)
        data = torch.stack([each.data for each in self.waiting])
        self.waiting.clear()
        return [[Chunk("video", data, 0, self.rate, 0, frame.time)]]

    def flush(self, state):
        return []

    def end(self, state): ...


def test_who_draws_several_pictures_at_once_gets_them_at_its_own_rate():
    pipeline = Together()
    metrics = live(FakeSource(rate=60), Session(pipeline, WorldControl()), FakeSink(), until=1.5)
    gaps = sorted(later - sooner for sooner, later in zip(pipeline.read, pipeline.read[1:], strict=False))
    assert len(pipeline.read) > 20, "what came while a chunk was drawn was kept"
    assert gaps[len(gaps) // 2] == pytest.approx(1 / pipeline.rate, abs=0.015)
    assert gaps[len(gaps) * 9 // 10] < 3 / pipeline.rate, "but for hiccups of a busy machine"
    assert metrics.frame_age < 0.3
