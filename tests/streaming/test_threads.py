"""A thread that rests gives up nothing but its idle workers."""

from __future__ import annotations

import torch

from millstream.streaming.threads import rest


def test_a_thread_computes_the_same_after_a_rest():
    numbers = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    before, threads = numbers @ numbers, torch.get_num_threads()
    rest()
    rest()
    assert torch.get_num_threads() == threads
    torch.testing.assert_close(numbers @ numbers, before)


def test_a_machine_without_that_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("millstream.streaming.threads.Path.read_text", lambda *_, **__: "")
    rest()
