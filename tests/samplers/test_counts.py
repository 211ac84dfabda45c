"""How many tokens per step: the published formulas, by hand and for any size."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.samplers import counts as c

SCHEDULES = [c.share_counts, c.curve_counts, c.cosine_counts, c.even_counts]


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(data=st.data())
def test_every_step_decides_something_and_all_are_decided(schedule: c.CountSchedule, data: st.DataObject) -> None:
    n_tokens = data.draw(st.integers(1, 300))
    n_steps = data.draw(st.integers(1, n_tokens))
    counts = schedule(n_tokens, n_steps)
    assert len(counts) == n_steps
    assert min(counts) >= 1
    assert sum(counts) == n_tokens


def test_maskgil_shares_of_256_tokens_in_8_steps() -> None:
    weights = [2 / math.pi * math.acos(1 - k / 7) for k in range(8)]
    expected = [max(1, round(256 * w / sum(weights))) for w in weights[:-1]]
    assert c.share_counts(256, 8) == [*expected, 256 - sum(expected)]
    assert c.share_counts(256, 8)[0] == 1  # its weight is 0
    assert c.share_counts(256, 1) == [256]


def test_arpg_leaves_what_its_curve_says() -> None:
    counts = c.curve_counts(256, 64)
    left = [256 - sum(counts[: k + 1]) for k in range(64)]
    for k in range(20, 50):  # where no clamp is at work
        assert left[k] == math.floor(256 * 2 / math.pi * math.acos((k + 1) / 64))
    assert left[-1] == 0  # the published clamp leaves one


def test_mar_uses_the_cosine() -> None:
    counts = c.cosine_counts(256, 32)
    assert 256 - sum(counts[:16]) == math.floor(256 * math.cos(math.pi / 4))


def test_as_many_steps_as_tokens_is_raster() -> None:
    for schedule in SCHEDULES:
        assert schedule(17, 17) == [1] * 17
    assert c.even_counts(12, 4) == [3, 3, 3, 3]
    assert c.curve_counts(10, 10, "linear") == [1] * 10


def test_blocks_are_decided_one_after_the_other() -> None:
    assert c.block_counts([4, 4, 4], 1) == [4, 4, 4]
    assert c.block_counts([4, 0, 1], 2, c.even_counts) == [2, 2, 1]


@pytest.mark.parametrize(("n_tokens", "n_steps"), [(0, 1), (4, 0), (4, 5)])
def test_what_cannot_be_shared_out_is_refused(n_tokens: int, n_steps: int) -> None:
    for schedule in SCHEDULES:
        with pytest.raises(ValueError, match="must be"):
            schedule(n_tokens, n_steps)
    with pytest.raises(ValueError, match="arccos, cosine, linear, got 'square'"):
        c.curve_counts(4, 2, "square")  # type: ignore[arg-type]
