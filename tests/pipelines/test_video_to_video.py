"""A camera in, the world out: strength, batching, replay, and what is refused."""

import pytest
import torch

from millstream.pipelines.world_video import remaining
from millstream.samplers import FlowSampler
from millstream.streaming import Snapshot, step_together


def pictures(chunks):
    return torch.cat([chunk.data for chunk in chunks])


@pytest.mark.parametrize("rule", ["euler", "heun", "unipc", "renoise"])
def test_strength_goes_from_the_picture_to_the_dream(make, seeded, rule, camera, play):
    pipe = make(sampler=FlowSampler(4, rule=rule, shift=3.0))
    frames = camera(4)

    def drawn(strength):
        with pipe.stream("a cave", generator=seeded(), strength=strength) as session:
            return pictures(play(session, frames))

    kept = drawn(None)
    assert torch.equal(drawn(0), kept)
    assert torch.equal(kept[0], pipe.codec.decode(pipe.codec.encode(frames[0].data[None, None]))[0, 0])
    with pipe.stream("a cave", generator=seeded()) as session:
        dreamt = torch.cat([session.step()[0].data for _ in frames])
    assert torch.equal(drawn(1), dreamt), "strength 1 ignores the picture"
    distances = [float((drawn(strength) - kept).abs().mean()) for strength in (0.01, 0.1, 0.3, 0.6)]
    assert distances == sorted(distances)
    assert distances[0] < 0.1 * distances[-1]
    assert drawn(0.9999).sub(dreamt).abs().max() < 1e-2, "and nothing jumps on the way there"


def test_levels_are_the_last_steps_of_the_sampler():
    sampler = FlowSampler(4, shift=3.0)
    whole = sampler.sigmas()
    for steps in (1, 2, 3, 4):
        assert remaining(sampler, None, steps / 4, steps / 4) == pytest.approx(whole[4 - steps :])
    between = remaining(sampler, None, 0.6, 0.6)
    assert len(between) == 4
    assert whole[1] > between[0] > whole[2]
    assert len(remaining(sampler, None, 0.3, 0.6)) == 4, "less strength for a while keeps the number of steps"
    listed = FlowSampler(timesteps=[999, 700, 300], shift=1.0)
    assert remaining(listed, None, 0.7, 0.7) == pytest.approx([0.7, 0.3, 0.0])
    assert remaining(listed, None, 1.0, 1.0) == pytest.approx(listed.sigmas())
    assert remaining(listed, None, 0.1, 0.1) == pytest.approx([0.1, 0.0])


def test_the_same_seed_and_frames_give_the_same_pictures(pipe, make, seeded, camera, play):
    def drawn(pipe, seed=0, frames=None, **settings):
        with pipe.stream("a cave", generator=seeded(seed), **{"strength": 0.6} | settings) as session:
            return pictures(play(session, frames or camera(6)))

    first = drawn(pipe)
    assert torch.equal(first, drawn(make()))
    assert not torch.equal(first, drawn(pipe, seed=1))
    assert not torch.equal(first, drawn(pipe, frames=camera(6, seed=4)))
    assert not torch.equal(first, drawn(pipe, guidance_scale=3.0))
    assert not torch.equal(first[1:], drawn(pipe, frames=[camera(1, seed=9)[0], *camera(6)[1:]])[1:]), "it remembers"


def test_a_chunk_answers_its_picture(pipe, camera, play):
    session = pipe.stream("a cave", strength=0.5)
    frames = camera(3)
    assert [(chunk.time, chunk.start) for chunk in play(session, frames)] == [(10.0, 0), (11.0, 1), (12.0, 2)]


def test_cameras_of_any_strength_share_their_passes_and_nothing_else(pipe, make, seeded, monkeypatch, camera, play):
    settings = [{"strength": 0.9}, {"strength": 0.6}, {"strength": 0.3}, {"strength": None}, {"strength": 1}]
    sessions = [pipe.stream(f"cave {n}", generator=seeded(n), **setting) for n, setting in enumerate(settings)]
    inputs = [camera(6, seed=n) for n in range(len(settings))]
    together = [step_together(sessions, list(frames)) for frames in zip(*inputs)]
    for n, setting in enumerate(settings):
        with make().stream(f"cave {n}", generator=seeded(n), **setting) as session:
            alone = pictures(play(session, inputs[n]))
        shared = pictures([chunk for step in together for chunk in step[n]])
        torch.testing.assert_close(shared, alone, rtol=0, atol=1e-5)
    passes = []
    redraw = pipe.redraw
    monkeypatch.setattr(pipe, "redraw", lambda states, *rest: passes.append(len(states)) or redraw(states, *rest))
    step_together(sessions, [frames[0] for frames in inputs])
    assert sorted(passes) == [1, 2], "0.9 and 0.6 both take two steps"


def test_strength_is_steered_while_it_runs_and_without_a_picture_the_world_dreams_on(pipe, seeded, camera, play):
    frames = camera(6)
    session, twin = (pipe.stream("a cave", generator=seeded(), strength=0.3) for _ in range(2))
    play(session, frames[:3]), play(twin, frames[:3])
    version = session.steer(strength=0.9)
    (bold,), (mild,) = session.step(frames[3]), twin.step(frames[3])
    assert bold.version == version
    assert not torch.equal(bold.data, mild.data)
    assert session.step()[0].data.isfinite().all()
    with pytest.raises(ValueError, match=r"strength must be between 0 \(keep the input\) and 1 \(ignore it\), got 1.5"):
        session.steer(strength=1.5)
    assert session.control.strength == 0.9


def test_a_snapshot_goes_on_as_the_stream_would(pipe, make, seeded, tmp_path, camera, play):
    frames = camera(12)
    session = pipe.stream("a cave", generator=seeded(), strength=0.6, skip_similar=0.5, follow_motion=0.5)
    play(session, frames[:5])
    path = session.snapshot().save(tmp_path / "here.safetensors")
    expected = play(session, frames[5:])
    other = make().stream("elsewhere", generator=seeded(8))
    other.restore(Snapshot.load(path))
    chunks = play(other, frames[5:])
    assert torch.equal(pictures(chunks), pictures(expected))
    assert [chunk.start for chunk in chunks] == [chunk.start for chunk in expected] == list(range(5, 12))


def test_a_snapshot_of_a_world_from_before_there_were_cameras_is_read(pipe, seeded):
    session = pipe.stream("a cave", generator=seeded())
    for _ in range(3):
        session.step()
    snapshot = session.snapshot()
    new = {"given", "inputs", "skipped", "motion", "wish"}
    old = Snapshot(
        {name: leaf for name, leaf in snapshot.leaves.items() if name not in new},
        {name: value for name, value in snapshot.control.items() if name not in ("strength", "stream_batch")},
        None,
        snapshot.kind,
    )
    expected = session.step()[0]
    session.restore(old)
    (chunk,) = session.step()
    assert torch.equal(chunk.data, expected.data)
    assert chunk.start == 3


def test_no_value_is_read_on_the_host_while_redrawing(pipe, seeded, monkeypatch, camera, play):
    from torch.utils._python_dispatch import TorchDispatchMode

    from millstream.kernels import noise

    class HostReads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(noise, "_check", lambda seed, frame, step, shape, dtype: torch.Size(shape).numel())
    frames = camera(6)
    for batched in (False, True):
        session = pipe.stream("a cave", generator=seeded(), strength=0.8, stream_batch=batched, guidance_scale=2.0)
        session.step(frames[0])
        with HostReads() as reads:
            play(session, frames[1:])
        assert reads.count == 0
