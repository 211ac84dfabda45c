"""The world's recipe on two tiny worlds: noise levels, batches with splices, and a few steps of training."""

from __future__ import annotations

import pytest
import torch

from millstream.models.frame_codec import FrameAutoencoder
from millstream.models.text_encoder import ByteTextEncoder
from millstream.models.transformer import CausalTransformer3DModel
from millstream.training import world as recipe
from millstream.training.trainer import Budget

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(autouse=True)
def _few_phrases(monkeypatch):
    monkeypatch.setattr(recipe, "PHRASES", 16)


@pytest.fixture
def codec() -> FrameAutoencoder:
    torch.manual_seed(0)
    return FrameAutoencoder(latent_channels=4, widths=(8, 8, 8), encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0))


def tiny_encoder() -> ByteTextEncoder:
    return ByteTextEncoder(dim=8, tokens=2, layers=1, heads=2, max_bytes=48)


def tiny_transformer(latent_channels: int, actions: int, text_dim: int, grid: tuple[int, int]):
    return CausalTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=text_dim,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        action_dim=actions,
        cross_attention_layers=(0,),
        position_grid=grid,
    )


def numbered(episodes) -> torch.Tensor:
    """Latents that say which frame they are."""
    return torch.arange(len(episodes)).float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def test_noise_levels_mix_clean_and_noisy_history():
    torch.manual_seed(0)
    sigma, weight = recipe.noise_levels(2000, 32, torch.device("cpu"))
    assert sigma.min() > 0
    assert sigma.max() < 1
    assert float(weight.mean()) == pytest.approx(1, abs=1e-4)
    light = weight == weight.min()  # the nearly clean ones weigh less: there is little to learn from them
    assert sigma[light].max() < recipe.CLEAN_SIGMA
    share = light.float().mean(dim=1)
    assert share.min() == 0
    assert share.max() == 1
    assert float(share.mean()) == pytest.approx(0.5, abs=0.03)


def test_a_plain_batch_is_one_run_of_frames_with_its_actions(episodes, monkeypatch):
    monkeypatch.setattr(recipe, "SPLICED", 0.0)
    batch = recipe.Windows(numbered(episodes), episodes, tiny_encoder(), 64)()
    frames = batch["latents"][:, :, 0, 0, 0].long()
    assert (frames.diff(dim=1) == 1).all()
    assert not batch["after"].any()
    assert torch.equal(batch["actions"], episodes.actions[frames].float())
    assert (episodes.episodes[frames] == episodes.episodes[frames[:, :1]]).all()
    assert not episodes.held_out[frames].any()


def test_a_splice_takes_the_other_worlds_frames_and_prompt(episodes, monkeypatch):
    monkeypatch.setattr(recipe, "SPLICED", 1.0)
    monkeypatch.setattr(recipe, "UNPROMPTED", 0.0)
    torch.manual_seed(0)
    windows = recipe.Windows(numbered(episodes), episodes, tiny_encoder(), 64)
    batch = windows()
    frames, after = batch["latents"][:, :, 0, 0, 0].long(), batch["after"]
    assert (after.long().diff(dim=1) >= 0).all()
    assert not after[:, 0].any()
    assert after[:, -1].all()
    assert torch.equal(episodes.world[frames], batch["worlds"].gather(1, after.long()))
    assert torch.equal(batch["actions"], episodes.actions[frames].float())
    assert (batch["worlds"][:, 0] != batch["worlds"][:, 1]).any()
    for prompts, worlds in zip(batch["prompts"], batch["worlds"]):
        for prompt, index in zip(prompts, worlds):
            assert (windows.prompts[index] == prompt).all(dim=1).any()
            assert not (windows.prompts[1 - index] == prompt).all(dim=1).any()


def test_an_unprompted_window_is_silent_and_of_no_world(episodes, monkeypatch):
    monkeypatch.setattr(recipe, "UNPROMPTED", 1.0)
    encoder = tiny_encoder()
    batch = recipe.Windows(numbered(episodes), episodes, encoder, 4)()
    assert (batch["worlds"] == -1).all()
    assert (batch["prompts"] == encoder.tokenize([""])[0]).all()


def test_each_frame_attends_to_the_prompt_of_its_side_of_the_splice():
    encoder = tiny_encoder()
    transformer = tiny_transformer(4, 3, 8, (2, 2))
    tokens = encoder.encode(["a maze", "a pool", "a hall", "a pit"])
    after = torch.tensor([[False, True, True], [False, False, True]])
    keys = recipe.keys_per_frame(transformer, tokens, after)
    expected = transformer.embed_text(tokens[[0, 1, 1, 2, 2, 3]])
    assert [len(layer) for layer in keys] == [2, 0]
    for seen, wanted in zip(keys[0], expected[0], strict=True):
        torch.testing.assert_close(seen, wanted)


@pytest.mark.parametrize("unprompted", [0.0, 1.0])
def test_the_loss_is_a_number_and_reaches_every_weight(episodes, monkeypatch, unprompted):
    monkeypatch.setattr(recipe, "UNPROMPTED", unprompted)
    encoder = tiny_encoder()
    objective = recipe.WorldObjective(tiny_transformer(4, 3, 8, (2, 2)), encoder)
    loss, logs = objective(recipe.Windows(torch.randn(len(episodes), 4, 4, 4), episodes, encoder, 1)())
    loss.backward()
    assert all(float(value.detach()) >= 0 for value in (loss, *logs.values()))
    silent = [name for name, value in objective.named_parameters() if value.grad is None]
    assert not silent
    assert all(value.grad.isfinite().all() for value in objective.parameters())


def test_encode_all_is_the_codec_frame_by_frame(episodes, codec):
    codec.latent_mean.fill_(0.3)
    codec.latent_std.fill_(2.0)
    latents = recipe.encode_all(codec, episodes, torch.device("cpu"), chunk=32)
    frames = episodes.frames().permute(0, 3, 1, 2)[None].float() / 255
    with torch.no_grad():
        torch.testing.assert_close(latents, codec.encode(frames)[0].movedim(1, 0), atol=1e-5, rtol=1e-4)


def test_trains_saves_and_goes_on_from_saved_weights(episodes, codec, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "world_transformer", tiny_transformer)
        patch.setattr(recipe, "ByteTextEncoder", tiny_encoder)
        budget = Budget(5.0, steps=3, warmup_steps=1)
        recipe.train(codec, episodes, budget, tmp_path / "first", batch_size=2, seed=0)
    first = CausalTransformer3DModel.from_pretrained(tmp_path / "first" / "transformer")
    assert first.config.action_dim == 3
    assert tuple(first.config.position_grid) == (2, 2)
    slow = Budget(5.0, steps=1, learning_rate=1e-9)
    recipe.train(codec, episodes, slow, tmp_path / "second", batch_size=2, seed=1, start=tmp_path / "first")
    second = CausalTransformer3DModel.from_pretrained(tmp_path / "second" / "transformer")
    for name, value in second.state_dict().items():
        torch.testing.assert_close(value, first.state_dict()[name], atol=1e-6, rtol=1e-5)
    assert ByteTextEncoder.from_pretrained(tmp_path / "second" / "text_encoder").config.dim == 8


def test_the_command_needs_a_trained_codec(shards, tmp_path):
    with pytest.raises(OSError, match=str(tmp_path.name)):
        recipe.main(["--data", str(shards), "--codec", str(tmp_path), "--out", str(tmp_path / "world")])


def test_the_embedded_world_has_the_size_it_claims():
    with torch.device("meta"):
        transformer = recipe.world_transformer(24, 7, 128, (6, 8))
    assert sum(value.numel() for value in transformer.parameters()) == pytest.approx(5.8e6, rel=0.02)
