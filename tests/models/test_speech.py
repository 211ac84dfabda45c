"""The speaking model: streamed equals whole, and its plan says what sounds when."""

from __future__ import annotations

import pytest
import torch

from millstream.models.phonemes import PADDING, PAUSE, pause_distances, spell, token
from millstream.models.speech import LOOK_AHEAD, SpeechTransformer, make_plan

TINY = {
    "latent_channels": 6,
    "voices": ("ann", "bob"),
    "phoneme_dim": 16,
    "dim": 64,
    "layers": 2,
    "ffn_dim": 64,
    "head_dim": 32,
    "head_layers": 1,
    "window": 8,
}


@pytest.fixture(scope="module")
def model() -> SpeechTransformer:
    torch.manual_seed(0)
    made = SpeechTransformer(**TINY).eval()
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return made


@torch.no_grad()
def test_cached_frames_equal_the_whole_under_the_window(model: SpeechTransformer) -> None:
    rows, frames = 2, 20  # more frames than the window holds
    tokens, voice = torch.randint(0, PADDING, (rows, 30)), torch.tensor([0, 1])
    encoded = model.encode_phonemes(tokens, voice)
    plan = make_plan(torch.full((rows, 30), 7.0), 0, frames, model.slots)
    actions = model.frame_actions(encoded, plan, voice)
    previous = torch.randn(rows, 6, frames)
    whole = model(previous, torch.full((rows,), 0.3), actions, mask=model.window.mask(frames, 1))
    assert torch.allclose(whole, model(previous, torch.full((rows,), 0.3), actions), atol=1e-6)
    cache = model.make_cache(rows)
    size = cache.bytes
    parts = [model.next_frames(previous[..., t], actions[:, t], cache, [0, 1], 0.3) for t in range(frames)]
    torch.testing.assert_close(torch.stack(parts, 1), whole, atol=1e-5, rtol=1e-4)
    assert cache.bytes == size
    changed = previous.clone()
    changed[..., 0] += 10  # further back than the window of each of two layers
    far = model(changed, torch.full((rows,), 0.3), actions)
    assert torch.allclose(far[:, 15:], whole[:, 15:], atol=1e-6)
    assert not torch.allclose(far[:, 5], whole[:, 5], atol=1e-4)


@torch.no_grad()
def test_text_that_comes_later_changes_only_the_last_sounds(model: SpeechTransformer) -> None:
    voice, tokens = torch.tensor([0]), torch.randint(4, PADDING, (1, 60))
    short, long = model.encode_phonemes(tokens[:, :40], voice), model.encode_phonemes(tokens, voice)
    assert torch.allclose(short[:, : 40 - LOOK_AHEAD], long[:, : 40 - LOOK_AHEAD], atol=1e-6)
    assert not torch.allclose(short[:, 39], long[:, 39], atol=1e-3)


def test_plan_holds_each_sound_for_its_length() -> None:
    plan = make_plan(torch.tensor([[3.0, 5.0, 2.0]]), 0, 3, 4)
    assert plan.phoneme.flatten().tolist() == [0] * 3 + [1] * 5 + [2] * 4  # the last is held to the end
    assert plan.elapsed.flatten()[3:8].tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    later = make_plan(torch.tensor([[3.0, 5.0, 2.0]]), 1, 2, 4)
    assert torch.equal(later.phoneme, plan.phoneme[:, 1:])
    assert torch.equal(later.elapsed, plan.elapsed[:, 1:])


def test_pauses_are_counted_both_ways() -> None:
    before, after = pause_distances(torch.tensor([[8, PAUSE, 8, 8, PAUSE, 8, PADDING]]))
    assert before.tolist() == [[15, 0, 1, 2, 0, 1, 0]]
    assert after.tolist() == [[1, 0, 2, 1, 0, 1, 0]]
    assert spell(torch.tensor([token("hh", begins=True), token("ay", True)])) == "hh 'ay"


@torch.no_grad()
def test_durations_follow_the_pace_and_voices_are_named(model: SpeechTransformer, tmp_path) -> None:
    encoded = model.encode_phonemes(torch.randint(4, PADDING, (1, 9)), torch.tensor([1]))
    model.duration[-1].bias.fill_(3.0)
    assert torch.allclose(model.durations(encoded, 2.0) * 2, model.durations(encoded), rtol=1e-5)
    assert model.voice_number("bob") == 1
    with pytest.raises(ValueError, match="voice must be one of ann, bob, got 'eve'"):
        model.voice_number("eve")
    with pytest.raises(ValueError, match="dim must be a multiple of 64"):
        SpeechTransformer(**(TINY | {"dim": 60}))
    model.save_packed(tmp_path)
    packed = SpeechTransformer.from_pretrained(tmp_path)
    assert torch.allclose(packed.durations(encoded), model.durations(encoded), rtol=0.05)
