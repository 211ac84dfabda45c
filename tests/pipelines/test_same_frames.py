"""The same seed and controls give the same frames, whichever way they are asked for; anything else gives others."""

import pytest
import torch

from millstream.samplers import FlowSampler
from millstream.streaming import Snapshot

SCRIPT = ["KeyW", "KeyW", None, "ArrowLeft", "Space", "KeyW", None, "KeyD"]


def clip(pipe, seeded, seed=0, prompt="a brick corridor", keys=SCRIPT, **settings):
    return pipe(prompt, num_frames=12, keys=keys, generator=seeded(seed), output_type="pt", **settings).frames


def test_a_clip_is_the_same_twice_and_is_the_stream_drained(pipe, seeded, draw):
    first = clip(pipe, seeded)
    assert torch.equal(first, clip(pipe, seeded))
    with pipe.stream("a brick corridor", generator=seeded()) as session:
        assert torch.equal(first, draw(session, 12, SCRIPT))
    assert pipe.arena.in_use == 0


def test_iterating_gives_the_frames_of_the_clip(pipe, seeded):
    with pipe.stream("a slime arena", generator=seeded()) as session:
        frames = [frame for _, frame in zip(range(6), session)]
    assert torch.equal(
        torch.stack(frames),
        pipe("a slime arena", num_frames=6, generator=seeded(), output_type="pt").frames,
    )


def test_another_pipeline_of_the_same_weights_draws_the_same(pipe, make, seeded):
    assert torch.equal(clip(pipe, seeded), clip(make(), seeded))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"prompt": "a slime arena"},
        {"keys": ["KeyW", "KeyW", None, "ArrowRight"]},
        {"num_inference_steps": 3},
        {"guidance_scale": 3.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_user_changes_changes_the_frames(pipe, seeded, change):
    assert (clip(pipe, seeded) - clip(pipe, seeded, **change)).abs().max() > 0.01


def test_keys_change_nothing_before_they_are_pressed(pipe, seeded):
    usual, other = clip(pipe, seeded), clip(pipe, seeded, keys=[*SCRIPT[:5], "KeyS"])
    assert torch.equal(usual[:5], other[:5])
    assert not torch.equal(usual[5], other[5])


def test_without_a_generator_every_stream_is_another(pipe):
    one, two = (pipe("a cave", num_frames=2, output_type="pt").frames for _ in range(2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("at", [0, 2, 9], ids=["not begun", "ring half full", "ring turned over"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_snapshot_goes_on_from_the_file_in_a_new_pipeline(make, seeded, draw, tmp_path, at, sinks):
    session = make(sinks=sinks).stream("a brick corridor", generator=seeded())
    if at:
        draw(session, at, SCRIPT)
    path = session.snapshot().save(tmp_path / "here.safetensors")
    expected = draw(session, 9, SCRIPT)
    other = make(sinks=sinks).stream("another prompt", generator=seeded(5))
    draw(other, 3)
    other.restore(Snapshot.load(path))
    assert torch.equal(expected, draw(other, 9, SCRIPT))
    session.restore(Snapshot.load(path))
    assert torch.equal(expected, draw(session, 9, SCRIPT)), "and back in the session it came from"


def test_a_snapshot_is_untouched_by_later_steps(pipe, seeded, draw):
    session = pipe.stream("a brick corridor", generator=seeded())
    draw(session, 6)
    snapshot = session.snapshot()
    before = {name: leaf.clone() for name, leaf in snapshot.leaves.items() if isinstance(leaf, torch.Tensor)}
    expected = draw(session, 6)
    assert before
    assert all(torch.equal(snapshot.leaves[name], leaf) for name, leaf in before.items())
    for _ in range(2):
        session.restore(snapshot)
        assert torch.equal(draw(session, 6), expected)


def test_both_branches_of_a_fork_draw_what_the_trunk_would_have(pipe, seeded, draw):
    expected = clip(pipe, seeded)
    session = pipe.stream("a brick corridor", generator=seeded())
    draw(session, 4, SCRIPT[:4])
    fork = session.fork()
    branches = [
        torch.stack([s.step()[0].data[0] for s in (session, fork) if s.steer(keys={k} if k else ()) or True])
        for k in [*SCRIPT[4:], *[None] * 4]
    ]  # turn by turn
    for branch in torch.stack(branches).unbind(1):
        assert torch.equal(branch, expected[4:])
    fork.steer(keys={"KeyS"}, prompt="a slime arena")
    assert not torch.equal(draw(fork, 3), draw(session, 3))
    assert pipe.arena.in_use == 2


def test_reset_begins_again_with_the_generators_next_seed(pipe, seeded, draw):
    generator = seeded()
    state = generator.get_state()
    session = pipe.stream("a brick corridor", generator=generator)
    first = draw(session, 7)
    session.reset()
    second = draw(session, 7)
    assert not torch.equal(first, second)
    generator.set_state(state)
    session.reset()
    assert torch.equal(draw(session, 7), first)
    session.reset()
    assert torch.equal(draw(session, 7), second)


@pytest.mark.parametrize("rule", ["euler", "heun", "unipc", "renoise"])
def test_every_rule_draws_and_goes_on_from_a_snapshot(make, seeded, draw, rule):
    pipe = make(sampler=FlowSampler(3, rule=rule))
    session = pipe.stream("a cave", generator=seeded())
    draw(session, 2)
    snapshot = session.snapshot()
    frames = draw(session, 3)
    assert frames.isfinite().all()
    session.restore(snapshot)
    assert torch.equal(draw(session, 3), frames)


def test_heun_asks_the_network_at_both_ends_of_a_step(make, seeded, monkeypatch):
    pipe = make(sampler=FlowSampler(2, rule="heun"))
    asked = []
    flow = pipe._flow
    monkeypatch.setattr(pipe, "_flow", lambda latents, sigma, *rest: asked.append(sigma) or flow(latents, sigma, *rest))
    pipe.stream("a cave", generator=seeded()).step()
    assert asked == [1.0, 0.5, 0.5], "step 1 at both ends, step 2 to 0 at one"


def test_a_stream_remembers_as_much_as_its_window_and_no_more(pipe, seeded):
    """Different pasts, then the same true frames: what is drawn next differs until the pasts have left the window."""

    def next_frame(prompt, shown):
        from millstream.streaming import Frame

        session = pipe.stream(prompt, generator=seeded())
        for _ in range(3):
            session.step()
        session.steer(prompt="a slime arena")
        for number in range(shown):
            session.step(Frame(torch.full((3, 32, 48), 0.1 * number), 0.0))
        return session.step()[0].data

    assert not torch.equal(next_frame("a cave", 1), next_frame("a river", 1))
    longest = pipe.window.frames * len(pipe.transformer.blocks)
    assert torch.allclose(next_frame("a cave", longest), next_frame("a river", longest), atol=1e-5)
