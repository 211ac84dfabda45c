import threading
import time

import pytest

from millstream.streaming import Bounded, Closed, Latest


def in_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_latest_gives_the_newest_and_counts_the_rest():
    box = Latest()
    for item in range(5):
        box.put(item)
    assert box.get(timeout=1) == 4
    assert box.dropped == 4
    with pytest.raises(TimeoutError, match=r"nothing came within 0\.01 s"):
        box.get(timeout=0.01)


def test_latest_never_holds_its_producer():
    box = Latest()
    start = time.monotonic()
    for item in range(10_000):
        box.put(item)
    assert time.monotonic() - start < 1
    assert len(box) == 1


@pytest.mark.parametrize("box", [Latest(), Bounded(3)])
def test_what_was_put_before_close_is_still_read(box):
    box.put("last")
    box.close()
    box.close()
    assert box.get() == "last"
    with pytest.raises(Closed):
        box.get()
    with pytest.raises(Closed):
        box.put("too late")


def test_bounded_keeps_order_and_loses_nothing():
    box = Bounded(2)

    def produce():
        for item in range(200):
            box.put(item)
        box.close()

    producer = in_thread(produce)
    assert list(box) == list(range(200))
    producer.join(1)


def test_bounded_holds_its_producer_until_there_is_room():
    box = Bounded(1)
    box.put("first")
    with pytest.raises(TimeoutError, match="the reader is behind by 1 items"):
        box.put("second", timeout=0.01)
    assert len(box) == 1
    thread = in_thread(lambda: box.put("second", timeout=2))
    assert [box.get(timeout=2), box.get(timeout=2)] == ["first", "second"]
    thread.join(1)


def test_close_wakes_a_waiting_producer_and_a_waiting_consumer():
    full, empty, seen = Bounded(1), Bounded(1), []
    full.put(0)

    def expect_closed(action):
        try:
            action()
        except Closed:
            seen.append("closed")

    threads = [in_thread(lambda: expect_closed(lambda: full.put(1))), in_thread(lambda: expect_closed(empty.get))]
    time.sleep(0.05)
    full.close()
    empty.close()
    for thread in threads:
        thread.join(1)
    assert seen == ["closed", "closed"]


def test_a_mailbox_needs_room_for_one():
    with pytest.raises(ValueError, match="at least 1 item, got size 0"):
        Bounded(0)


def test_latest_may_hold_the_newest_few():
    box = Latest(3)
    for item in range(5):
        box.put(item)
    assert [box.get(timeout=1) for _ in range(3)] == [2, 3, 4]
    assert box.dropped == 2
