"""Distillation on two tiny worlds: what the student draws in parallel is what its streams drew one by one."""

from __future__ import annotations

import pytest
import torch

from millstream.models.frame_codec import FrameAutoencoder
from millstream.models.text_encoder import ByteTextEncoder
from millstream.models.transformer import CausalTransformer3DModel
from millstream.pipelines.world import WorldPipeline
from millstream.samplers import FlowSampler
from millstream.training import distill, pack, streams
from millstream.training import world as recipe
from millstream.training.trainer import Budget
from millstream.training.world import FRAMES

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(autouse=True)
def _few_phrases(monkeypatch):
    monkeypatch.setattr(recipe, "PHRASES", 16)


@pytest.fixture
def encoder() -> ByteTextEncoder:
    torch.manual_seed(1)
    return ByteTextEncoder(dim=8, tokens=2, layers=1, heads=2, max_bytes=48).eval()


@pytest.fixture
def student() -> CausalTransformer3DModel:
    torch.manual_seed(0)
    return CausalTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        action_dim=3,
        cross_attention_layers=(0,),
        position_grid=(2, 2),
    )


def pool(student, encoder, episodes, *, context_sigma=0.0, rows=12, steps=2) -> streams.Streams:
    latents = torch.randn(len(episodes), 4, 4, 4, generator=torch.Generator().manual_seed(3))
    sampler = FlowSampler(num_inference_steps=steps, shift=3.0, rule="renoise", context_sigma=context_sigma)
    return streams.Streams(student, sampler, encoder, latents, episodes, rows=rows, batch_size=4)


def test_a_pass_over_all_frames_draws_what_the_stream_drew(student, encoder, episodes):
    """Of streams that began from nothing, so both saw the same history; with one sampler step, so it is the last."""
    torch.manual_seed(5)
    running = pool(student, encoder, episodes, steps=1)
    running.turn(renewed=1.0, cold=1.0)
    running.calls = streams.COLD_EVERY - 1
    batch = running()
    assert batch["latents"].shape == (1, streams.NEW, 4, 4, 4)
    with torch.no_grad():
        drawn = distill.DistillObjective(student, 0.0).draw(batch)
    torch.testing.assert_close(drawn.movedim(1, 2), batch["latents"], rtol=1e-4, atol=1e-4)


def test_noisy_frames_do_not_see_their_own_answer_nor_the_future(student):
    """A mask that leaked would make training easy and streams useless."""
    objective = distill.DistillObjective(student, 0.0)
    frames, new = FRAMES, streams.NEW
    mask = objective.mask(torch.zeros(1, 4, frames, 4, 4), twice=True)
    sees = mask[::4, ::4]  # one token of each frame
    assert sees.shape == (frames + new, frames + new)
    for number in range(new):
        row, place = frames + number, frames - new + number
        seen = sees[row].nonzero()[:, 0].tolist()
        assert seen == [*range(place - streams.CONTEXT, place), row]
    assert not sees[:frames, frames:].any()


def test_a_batch_goes_on_from_what_was_drawn_before(student, encoder, episodes):
    running = pool(student, encoder, episodes)
    before, keys = running.history.clone(), running.pressed.clone()
    running.turn(renewed=0.0)
    kept = ~running.true & ~running.cold
    assert torch.equal(running.history[kept, : streams.CONTEXT], before[kept, streams.NEW :])
    assert torch.equal(running.pressed[kept, : streams.CONTEXT], keys[kept, streams.NEW :])


def test_a_stream_begun_from_true_frames_shows_them(student, encoder, episodes):
    running = pool(student, encoder, episodes)
    running.turn(renewed=1.0, cold=0.0)
    index = (running.pointer - streams.NEW)[:, None] + torch.arange(streams.NEW)
    assert torch.equal(running.history[:, streams.CONTEXT :], running.latents[index])
    assert not episodes.held_out[index].any()


def test_a_stream_that_changes_worlds_changes_its_prompt_and_keeps_its_past(student, encoder, episodes, monkeypatch):
    monkeypatch.setattr(streams, "SWITCHED", 1.0)
    running = pool(student, encoder, episodes)
    running.turn(renewed=0.0)
    assert running.changed.any()
    running.calls = 0
    batch = running()
    assert not batch["after"][:, : streams.CONTEXT].any()
    assert batch["after"][:, streams.CONTEXT :].all()


def test_the_student_learns_at_every_second_call_and_the_teacher_never(student, encoder, episodes):
    objective = distill.DistillObjective(student, 0.1)
    running = pool(student, encoder, episodes, context_sigma=0.1)
    for number in range(4):
        objective.zero_grad(set_to_none=True)
        loss, logs = objective(running())
        loss.backward()
        learnt = [name.split(".")[0] for name, value in objective.named_parameters() if value.grad is not None]
        assert set(learnt) == ({"student", "critic"} if number % 2 == 0 else {"critic"})
        assert loss.isfinite()
        assert ("gap" in logs) == (number % 2 == 0)


def test_a_student_equal_to_its_critic_and_teacher_stays_where_it_is(student, encoder, episodes):
    objective = distill.DistillObjective(student, 0.1)
    loss, logs = objective(pool(student, encoder, episodes, context_sigma=0.1)())
    loss.backward()
    assert float(logs["gap"]) == 0
    moved = [
        value.grad.abs().max()
        for name, value in objective.named_parameters()
        if name.startswith("student.") and value.grad is not None
    ]
    assert max(moved) == 0


def test_trains_and_saves_what_loads(student, encoder, episodes, tmp_path, shards):
    world = tmp_path / "world"
    student.save_pretrained(world / "transformer")
    encoder.save_pretrained(world / "text_encoder")
    codec = FrameAutoencoder(latent_channels=4, widths=(8, 8, 8), encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0))
    sampler = FlowSampler(num_inference_steps=2, rule="renoise", context_sigma=0.1)
    budget = Budget(steps=6, learning_rate=1e-3, muon_scale=0.0, warmup_steps=1, ema_decay=0.5)
    out = tmp_path / "out"
    distill.train(world, codec, episodes, sampler, budget, out, rows=6, batch_size=2, seed=0)
    learnt = CausalTransformer3DModel.from_pretrained(out / "transformer")
    before, after = student.state_dict(), learnt.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(value.isfinite().all() for value in after.values())
    assert (out / "text_encoder" / "config.json").is_file()


def test_packs_what_was_trained_into_a_pipeline_that_draws(student, encoder, episodes, tmp_path, shards):
    world, out = tmp_path / "world", tmp_path / "packed"
    student.save_pretrained(world / "transformer")
    encoder.save_pretrained(world / "text_encoder")
    codec = FrameAutoencoder(latent_channels=4, widths=(8, 8, 8), encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0))
    codec.save_pretrained(tmp_path / "codec")
    words = ["--data", shards, "--codec", tmp_path / "codec", "--world", world, "--out", out, "--context-sigma", "0.05"]
    pack.main([str(word) for word in words])
    pipe = WorldPipeline.from_pretrained(out)
    assert pipe.scheduler.config["context_sigma"] == 0.05
    assert pipe.buttons == ["LEFT", "RIGHT", "ATTACK"]
    assert pipe(pipe.worlds[0], num_frames=2, output_type="pt").frames.shape == (2, 3, 32, 32)
