"""Prompts: read as published, kept, and changed in four ways."""

from __future__ import annotations

import pytest
import torch

from millstream.kernels import philox_normal
from millstream.pipelines.video_prompts import KEPT, cleaned


def test_prompts_are_zero_behind_their_end_as_published(pipe):
    """The loop of Wan's own pipeline, on the same encoder."""
    words = pipe.tokenizer("a corgi surfs", return_tensors="pt")
    with torch.no_grad():
        alone = pipe.text_encoder(words.input_ids, words.attention_mask).last_hidden_state[0]
    text = pipe.encode_prompt("a corgi surfs")
    assert text.shape == (8, 16)
    torch.testing.assert_close(text[: len(alone)], alone, atol=1e-5, rtol=1e-5)
    assert not text[len(alone) :].any()
    assert len(alone) == 4, "three words and an end"


def test_long_prompts_are_cut_at_the_text_length(pipe):
    assert pipe.encode_prompt("a corgi surfs in the sea " * 9).shape == (8, 16)


def test_entities_and_white_space_are_cleaned():
    assert cleaned("  a &amp;lt; b\n\tc ") == "a < b c"


def test_without_a_text_encoder_only_known_prompts_are_drawn(pipe, seeded):
    expected = pipe("a corgi surfs", num_frames=9, generator=seeded(), output_type="pt").frames
    pipe.encode_prompt("the red fox")
    pipe.drop_text_encoder()
    clip = pipe("a corgi surfs", num_frames=9, generator=seeded(), output_type="pt").frames
    assert torch.equal(clip, expected)
    with pipe.stream("a corgi surfs") as session:
        session.steer(prompt="the red fox")
        with pytest.raises(ValueError, match=r"no text encoder to read 'snow' with; .*'a corgi surfs', 'the red fox'"):
            session.steer(prompt="snow")
        session.step()


def test_what_was_encoded_beforehand_is_never_forgotten(pipe):
    prompts = [f"a corgi and {number}" for number in range(20)]
    for prompt in prompts:
        pipe.encode_prompt(prompt)
    for number in range(KEPT + 4):
        pipe.read_prompt(f"a fox and {number}")
    assert len(pipe._read) == 20 + KEPT, "what only passed is forgotten"
    pipe.drop_text_encoder()
    for prompt in prompts:
        pipe.encode_prompt(prompt)


def test_tokens_from_elsewhere_stand_for_their_prompt(pipe, seeded):
    expected = pipe("a corgi surfs", num_frames=9, generator=seeded(), output_type="pt").frames
    tokens = pipe.encode_prompt("a corgi surfs")
    pipe.keep_prompt("der Hund surft", tokens)
    pipe.drop_text_encoder()
    assert torch.equal(pipe("der Hund surft", num_frames=9, generator=seeded(), output_type="pt").frames, expected)
    with pytest.raises(ValueError, match=r"are \[8, 16\], got \[5, 16\]"):
        pipe.keep_prompt("x", tokens[:5])


def switched(pipe, switch, seed, steps=4, before=3):
    """Chunks before and after the prompt changes."""
    with pipe.stream("a corgi surfs", generator=seed) as session:
        first = [session.step()[0].data for _ in range(before)]
        session.steer(prompt="the red fox", switch=switch)
        later = [session.step() for _ in range(steps)]
        return first, [chunk.data for chunks in later for chunk in chunks], session.state


@pytest.mark.parametrize("switch", ["keep", "recache", "lerp", "cut"])
def test_every_switch_changes_what_comes_and_nothing_that_was(switch, make, seeded):
    pipe = make("longlive")
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        steady = [session.step()[0].data for _ in range(7)]
    first, later, _ = switched(pipe, switch, seeded())
    assert all(torch.equal(one, two) for one, two in zip(first, steady))
    assert len(later[0]) == (9 if switch == "cut" else 12), "a new shot begins with a first frame"
    assert (later[0][-9:] - steady[3][-9:]).abs().max() > 1e-3


def test_the_switches_differ_from_each_other(make, seeded):
    pipe = make("longlive")
    ends = [switched(pipe, switch, seeded())[1][0][-9:] for switch in ("keep", "recache", "lerp", "cut")]
    for number, one in enumerate(ends):
        for other in ends[number + 1 :]:
            assert (one - other).abs().max() > 1e-3


@torch.no_grad()
def reference_after_recache(pipe, latents, seed, window):
    """LongLive: a clear memory, the last min(window, n) clean frames replayed under the new prompt, block after block;
    then a chunk as ever. One forward over all of it, block-causal, stands for the passes."""
    from millstream.streaming.kv_cache import Window

    n = latents.shape[1]
    context = latents[:, n - min(window, n) :]
    text = pipe.encode_prompt("the red fox")[None]
    sigmas = pipe.recipe.sigmas()
    noises = [
        torch.stack(
            [philox_normal(torch.tensor([seed]), torch.tensor([n + f]), step, pipe.latent_size)[0] for f in range(3)], 1
        )
        for step in range(4)
    ]
    x, count = noises[0], context.shape[1]
    for step, sigma in enumerate(sigmas[:-1]):
        both = torch.cat([context, x], dim=1)[None]
        timestep = torch.tensor([[0.0] * count + [1000 * sigma] * 3])
        (flow,) = pipe.transformer(both, timestep, text, window=Window(window, pipe.recipe.sinks, 3), return_dict=False)
        x = x - sigma * flow[0, :, -3:]
        if sigmas[step + 1]:
            x = (1 - sigmas[step + 1]) * x + sigmas[step + 1] * noises[step + 1]
    return x


@pytest.mark.parametrize("before", [1, 3, 7])
def test_recache_replays_the_window_under_the_new_prompt(before, make, seeded):
    pipe = make("longlive")
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        for _ in range(before):
            session.step()
        latents = session.state.recall(min(12, session.state.frame)).clone()
        whole = torch.zeros(4, session.state.frame, 2, 4)
        whole[:, -latents.shape[1] :] = latents
        session.steer(prompt="the red fox", switch="recache")
        session.step()
        (drawn,) = session.state.finished
        expected = reference_after_recache(pipe, whole, session.state.seed, 12)
    torch.testing.assert_close(drawn, expected, atol=1e-3, rtol=1e-3)


def test_a_cut_begins_a_new_video(make, seeded):
    """After a cut nothing of the past is left: with the same noise it would be a fresh stream."""
    pipe = make("longlive")
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        for _ in range(3):
            session.step()
        session.steer(prompt="the red fox", switch="cut")
        cut = session.step()[0].data
        with pipe.stream("the red fox", generator=seeded()) as fresh:
            fresh.snapshot()  # begins it
            fresh.state.frame = 9  # whose noise is then drawn
            torch.testing.assert_close(fresh.step()[0].data, cut, atol=1e-5, rtol=1e-5)


def lengths(session, steps):
    return [sum(len(chunk.data) for chunk in session.step()) for _ in range(steps)]


def test_a_switch_counts_once_with_or_without_new_words(make, seeded):
    pipe = make("longlive")
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        assert lengths(session, 2) == [9, 12]
        session.steer(prompt="a corgi surfs", switch="cut")
        assert lengths(session, 2) == [9, 12], "a new shot of the same words"
        session.steer(prompt="the red fox")
        assert lengths(session, 1) == [12], "the switch does not stick"
        session.steer(prompt="in the snow", switch="cut")
        session.steer(prompt="the red fox", switch="keep")
        assert lengths(session, 2) == [9, 12], "what comes before the same step does not undo a cut"
        assert session.state.prompt == "the red fox"


def test_a_blend_reaches_the_new_prompt_in_even_steps(make, seeded):
    pipe = make("longlive")
    old, new = pipe.encode_prompt("a corgi surfs"), pipe.encode_prompt("the red fox")
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        session.step()
        session.steer(prompt="the red fox", switch="lerp")
        for share in (0.25, 0.5, 0.75, 1.0, 1.0):
            session.step()
            torch.testing.assert_close(session.state.text, torch.lerp(old, new, share))
        assert session.state.target is None


def test_a_blend_that_is_overtaken_goes_on_from_where_it_is(make, seeded):
    pipe = make("longlive")
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        session.step()
        session.steer(prompt="the red fox", switch="lerp")
        session.step()
        middle = session.state.text.clone()
        session.steer(prompt="the sea", switch="lerp")
        session.step()
        torch.testing.assert_close(session.state.text, torch.lerp(middle, pipe.encode_prompt("the sea"), 0.25))
        session.steer(prompt="snow", switch="keep")
        session.step()
        torch.testing.assert_close(session.state.text, pipe.encode_prompt("snow"))


@pytest.mark.parametrize("name", ["rolling_forcing", "streamdiffusion_v2", "krea", "causvid"])
@pytest.mark.parametrize("switch", ["recache", "cut"])
def test_what_is_under_way_is_shown_before_a_new_shot(name, switch, make, seeded):
    """No chunk is lost, whatever the plan: as many come out as were begun."""
    pipe = make(name)
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        chunks = [chunk for _ in range(6) for chunk in session.step()]
        session.steer(prompt="the red fox", switch=switch)
        for _ in range(6):
            chunks += session.step()
        chunks += session.flush()
    assert [chunk.version for chunk in chunks] == [0] * 6 + [1] * 6
    assert all(chunk.data.isfinite().all() for chunk in chunks)
    assert [chunk.start for chunk in chunks[1:]] == [chunk.start + len(chunk.data) for chunk in chunks[:-1]]
