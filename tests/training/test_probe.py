"""The probe learns to read actions from pictures alone, and reads nothing where nothing is to be seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from millstream.training.measures import balanced_accuracy
from millstream.training.probe import CONTEXT, Probe, read_actions, train_probe


def moving_square(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """A square that button 0 moves right and button 1 moves left, round and round; button 2 does nothing."""
    generator = torch.Generator().manual_seed(seed)
    actions = (torch.rand(count, 3, generator=generator) < torch.tensor([0.4, 0.4, 0.5])).to(torch.uint8)
    at = (4 * (actions[:, 0].long() - actions[:, 1].long())).cumsum(0) % 32
    frames = torch.zeros(count, 32, 32, 3, dtype=torch.uint8)
    for width in range(6):
        frames[torch.arange(count), 12:20, (at + width) % 32] = 255
    return frames, actions


@pytest.fixture(scope="module")
def probe() -> Probe:
    frames, actions = moving_square(3000, seed=0)
    starts = torch.arange(len(frames) - CONTEXT + 1)
    return train_probe(frames, actions, starts, steps=250, batch_size=32, width=8, learning_rate=3e-3)


def test_it_reads_buttons_that_show_and_not_the_one_that_does_not(probe):
    frames, actions = moving_square(600, seed=1)
    accuracy = balanced_accuracy(read_actions(probe, frames), actions[2:-1])
    moved = actions[:, 0] != actions[:, 1]  # both at once cancel, and then nothing is to be read
    seen = moved[2:-1]
    assert (balanced_accuracy(read_actions(probe, frames)[seen], actions[2:-1][seen])[:2] > 0.95).all()
    assert abs(float(accuracy[2]) - 0.5) < 0.1


def test_clips_are_read_alike_alone_together_and_in_any_batch_size(probe):
    frames, _ = moving_square(40, seed=2)
    clips = frames.view(2, 2, 10, 32, 32, 3)
    together = read_actions(probe, clips)
    assert together.shape == (2, 2, 10 - CONTEXT + 1, 3)
    assert together.dtype == torch.bool
    assert torch.equal(together[1, 0], read_actions(probe, clips[1, 0], batch_size=3))


def test_equal_seeds_train_equal_probes_and_leave_the_global_generator_alone():
    frames, actions = moving_square(60, seed=0)
    starts = torch.arange(57)
    before = torch.get_rng_state()
    first, again = (
        train_probe(frames, actions, starts, steps=3, batch_size=4, width=8, generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(first.parameters(), again.parameters()):
        assert torch.equal(one, other)


def test_what_cannot_be_read_is_refused(probe):
    frames, actions = moving_square(20, seed=0)
    with pytest.raises(ValueError, match="at least 4 frames"):
        read_actions(probe, frames[:3])
    with pytest.raises(ValueError, match="uint8 clips"):
        read_actions(probe, frames.float())
    with pytest.raises(ValueError, match="multiples of 32"):
        Probe(7, (90, 128))
    with pytest.raises(ValueError, match="got 20, 19, 3"):
        train_probe(frames, actions[:19], torch.arange(3))
    with pytest.raises(ValueError, match="got 20, 20, 0"):
        train_probe(frames, actions, torch.arange(0))
