"""Recorded steps, decoding beside drawing, and a host that never waits: the frames are those of the plain stream."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from millstream.pipelines import presets
from millstream.streaming import Frame, VideoControl
from millstream.streaming.graphs import Recordings

sys.path.append(str(Path(__file__).parent.parent))
from test_graphs import Tape

RECIPES = ["self_forcing", "longlive", "longlive_unbounded", "rolling_forcing", "krea", "streamdiffusion_v2"]
FAST = replace(presets.PRESETS["fast"], least_window=0)  # from which on it would keep attention
PRESETS = [FAST, replace(FAST, name="fp8", linears="fp8", reuse=1, kv="fp8", attention=None), presets.PRESETS["small"]]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def recorded(make, monkeypatch):
    """A pipeline whose steps are recorded on tapes after `patience` runs; 10^9 records none."""
    from millstream.kernels import noise

    monkeypatch.setattr(noise, "_check", lambda seed, frame, step, shape, dtype: torch.Size(shape).numel())  # CPU only

    def made(recipe, patience=1, **settings):
        pipe = make(recipe, **settings)
        for name in ("recordings", "decodings"):
            setattr(pipe.arena, name, Recordings(torch.device("cpu"), patience=patience, limit=99, record=Tape))
        return pipe

    return made


def frames(session, steps, switch=None, at=5):
    drawn = []
    for number in range(steps):
        if number == at and switch:
            session.steer(prompt="a red fox in snow", switch=switch)
        drawn += [chunk.data for chunk in session.step()]
    return torch.cat(drawn + [chunk.data for chunk in session.flush()])


@pytest.mark.parametrize("recipe", RECIPES)
def test_replayed_equals_run_to_the_bit(recorded, seeded, recipe):
    pipes = [recorded(recipe, patience) for patience in (1, 10**9)]
    one, other = (frames(pipe.stream("a corgi surfs", generator=seeded()), 12, "recache") for pipe in pipes)
    assert torch.equal(one, other)
    assert len(pipes[0].arena.recordings) >= 3
    assert len(pipes[0].arena.decodings) >= 2
    assert None not in pipes[0].arena.recordings._replays.values(), "nothing was refused"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_are_replayed_to_the_bit(recorded, seeded, preset):
    pipes = [recorded("longlive", patience, preset=preset) for patience in (1, 10**9)]
    one, other = (frames(pipe.stream("a corgi surfs", generator=seeded()), 9, "recache") for pipe in pipes)
    assert torch.equal(one, other)


def test_what_the_warmup_recorded_serves_every_later_stream(recorded, seeded):
    pipe, plain = recorded("longlive", 3), recorded("longlive", 10**9)
    pipe.warmup()
    known = set(pipe.arena.recordings._replays) | set(pipe.arena.decodings._replays)
    assert pipe.arena.in_use == 0
    for seed in (1, 2):
        one, other = (frames(p.stream("a corgi surfs", generator=seeded(seed)), 11, "recache") for p in (pipe, plain))
        assert torch.equal(one, other)
    assert set(pipe.arena.recordings._replays) | set(pipe.arena.decodings._replays) == known


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("switch", ["cut", "recache", "lerp"])
def test_decoding_behind_gives_the_same_pictures(make, seeded, recipe, switch):
    pipe, ahead = make(recipe), make(recipe)
    ahead.overlap = True
    one, other = (frames(p.stream("a corgi surfs", generator=seeded()), 8, switch) for p in (pipe, ahead))
    assert torch.equal(one, other)


def test_the_first_pictures_do_not_wait_for_the_second_chunk(make, seeded):
    pipe = make("longlive")
    pipe.overlap = True
    session = pipe.stream("a corgi surfs", generator=seeded())
    assert [len(session.step()) for _ in range(4)] == [1, 0, 1, 1]
    saved = session.snapshot()
    rest = [session.step()[0].data for _ in range(2)]
    again = pipe.stream("a corgi surfs", generator=seeded(5))
    again.restore(saved)
    assert all(torch.equal(one, again.step()[0].data) for one in rest)


class NoReads(TorchDispatchMode):
    """Refuses whatever would make the host wait for a GPU; the versions of controls always lie on the host."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            versions = self.state.versions
            on_host = (
                versions is not None and args[0].untyped_storage().data_ptr() == versions.untyped_storage().data_ptr()
            )
            assert on_host, f"the host waits for {func}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_host_reads_nothing_while_drawing(recorded, seeded, recipe):
    pipe = recorded(recipe, 10**9)
    session = pipe.stream("a corgi surfs", generator=seeded())
    for _ in range(3):
        session.step()
    with NoReads(session.state), torch.no_grad():
        for _ in range(4):
            pipe.draw(session.state, None, 1.0, 0)


def test_the_host_reads_nothing_while_redrawing_a_video(recorded, seeded):
    pipe = recorded("longlive", 10**9)
    session = pipe.stream("a corgi surfs", generator=seeded(), strength=0.6)
    picture = torch.rand(3, 16, 32, generator=seeded())
    for _ in range(20):
        session.step(Frame(picture, 0.0))
    with NoReads(session.state), torch.no_grad():
        for _ in range(12):
            pipe.advance([session.state], [VideoControl("a corgi surfs", strength=0.6)], [Frame(picture, 0.0)])


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_cuda_graphs_draw_what_the_steps_draw(make, seeded, recipe, overlap):
    def played(patience):
        pipe = make(recipe).to("cuda", torch.bfloat16)
        pipe.overlap = overlap
        for name in ("recordings", "decodings"):
            getattr(pipe.arena, name).patience = patience
        return frames(pipe.stream("a corgi surfs", generator=seeded()), 14, "recache"), pipe.arena

    (one, arena), (other, _) = played(1), played(10**9)
    assert torch.equal(one, other)
    assert len(arena.recordings) >= 3
    assert None not in (arena.recordings._replays | arena.decodings._replays).values(), "nothing was refused"


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_cuda_graphs_draw_what_the_steps_of_a_preset_draw(make, seeded, preset):
    def played(patience):
        pipe = make("longlive", preset=preset).to("cuda", torch.bfloat16)
        for name in ("recordings", "decodings"):
            getattr(pipe.arena, name).patience = patience
        return frames(pipe.stream("a corgi surfs", generator=seeded()), 12, "recache"), pipe.arena

    (one, arena), (other, _) = played(1), played(10**9)
    assert torch.equal(one, other)
    assert one.isfinite().all()
    assert None not in (arena.recordings._replays | arena.decodings._replays).values(), "nothing was refused"


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("overlap", [False, True])
def test_nothing_is_allocated_or_recorded_after_the_warmup(make, seeded, overlap):
    pipe = make("longlive").to("cuda", torch.bfloat16)
    pipe.overlap = overlap
    pipe.warmup()
    known = len(pipe.arena.recordings), len(pipe.arena.decodings)
    session = pipe.stream("a corgi surfs", generator=seeded())

    def drawn(count):
        for number in range(count):
            session.steer(prompt=("a corgi surfs", "a red fox in snow")[number // 20 % 2], switch="recache")
            session.step()
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        return stats["num_device_alloc"], torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    early = drawn(60)
    assert drawn(120) == early
    assert (len(pipe.arena.recordings), len(pipe.arena.decodings)) == known


@pytest.mark.gpu
@needs_cuda
def test_the_host_does_not_wait_for_the_gpu_while_drawing(make, seeded):
    pipe = make("longlive").to("cuda", torch.bfloat16)
    pipe.warmup()
    session = pipe.stream("a corgi surfs", generator=seeded())
    for _ in range(8):
        session.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            pipe.advance([session.state], [session.control], [None])
    finally:
        torch.cuda.set_sync_debug_mode("default")
