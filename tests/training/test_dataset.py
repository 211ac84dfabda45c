"""Shards seen as one stream: windows never cross an episode or a split, and frames come back as they were written."""

from __future__ import annotations

import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from millstream.training.dataset import Episodes


def write(directory, number: int, world: int, lengths: list[int], buttons=("A", "B"), size=(4, 6)) -> None:
    """A shard whose frame `i` is filled with `i` and whose episodes have the given lengths."""
    count = sum(lengths)
    episodes = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    frames = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, *size, 3).contiguous()
    actions = torch.randint(2, (count, len(buttons)), dtype=torch.uint8)
    metadata = {"world": f"world {world}", "world_index": str(world), "buttons": json.dumps(buttons)}
    tensors = {"frames": frames, "actions": actions, "episodes": episodes}
    save_file(tensors, directory / f"shard-{number:04d}.safetensors", metadata)


def test_shards_join_in_order(tmp_path):
    write(tmp_path, 0, 5, [30, 20])
    write(tmp_path, 1, 2, [50])
    episodes = Episodes.open(tmp_path)
    assert len(episodes) == 100
    assert episodes.size == (4, 6)
    assert episodes.names == ("world 2", "world 5")
    assert episodes.buttons == ("A", "B")
    assert episodes.world.tolist() == [1] * 50 + [0] * 50
    assert episodes.episodes.tolist() == [0] * 30 + [1] * 20 + [2] * 50
    assert episodes.frames()[:, 0, 0, 0].tolist() == [*range(50), *range(50)]


def test_take_reads_the_same_frames_as_joining_them(tmp_path):
    write(tmp_path, 0, 0, [30, 20])
    write(tmp_path, 1, 1, [40])
    episodes = Episodes.open(tmp_path)
    indices = torch.tensor([[0, 49, 50], [89, 3, 51]])
    assert torch.equal(episodes.take(indices), episodes.frames()[indices])


def test_the_end_of_every_shard_is_held_out(tmp_path):
    write(tmp_path, 0, 0, [100])
    write(tmp_path, 1, 1, [50])
    held_out = Episodes.open(tmp_path).held_out.nonzero()[:, 0].tolist()
    assert held_out == [*range(94, 100), *range(147, 150)]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=4),
    window=st.integers(1, 30),
    split=st.sampled_from(["train", "held_out"]),
)
def test_windows_are_exactly_those_inside_one_episode_and_one_split(tmp_path_factory, lengths, window, split):
    directory = tmp_path_factory.mktemp("shards")
    for number, shard in enumerate(lengths):
        write(directory, number, 0, shard)
    episodes = Episodes.open(directory)
    wanted = [
        start
        for start in range(len(episodes) - window + 1)
        if len(set(episodes.episodes[start : start + window].tolist())) == 1
        and set(episodes.held_out[start : start + window].tolist()) == {split == "held_out"}
    ]
    assert episodes.windows(window, split).tolist() == wanted


def test_windows_of_a_million_frames_take_no_time():
    count = 1_000_000
    stream = Episodes(
        shards=(),
        actions=torch.zeros(count, 1, dtype=torch.uint8),
        episodes=torch.arange(count) // 500,
        world=torch.zeros(count, dtype=torch.int64),
        held_out=torch.arange(count) >= count * 0.94,
        names=("world",),
        buttons=("A",),
    )
    began = time.perf_counter()
    starts = stream.windows(32)
    assert time.perf_counter() - began < 1.0
    assert len(starts) == 940_000 // 500 * (500 - 31)


def test_what_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="collect some first"):
        Episodes.open(tmp_path)
    write(tmp_path, 0, 0, [10])
    write(tmp_path, 1, 0, [10], buttons=("A", "C"))
    with pytest.raises(ValueError, match="keep them apart"):
        Episodes.open(tmp_path)


def test_bad_windows_are_refused(tmp_path):
    write(tmp_path, 0, 0, [10])
    episodes = Episodes.open(tmp_path)
    assert not len(episodes.windows(11))
    with pytest.raises(ValueError, match="at least 1 frame, got length 0"):
        episodes.windows(0)
    with pytest.raises(ValueError, match="'train' or 'held_out', got 'test'"):
        episodes.windows(4, "test")  # type: ignore[arg-type]
