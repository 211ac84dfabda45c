"""The codec's recipe on two tiny worlds."""

from __future__ import annotations

import pytest
import torch

from millstream.models.frame_codec import FrameAutoencoder
from millstream.training import codec as recipe
from millstream.training.trainer import Budget

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def small() -> FrameAutoencoder:
    torch.manual_seed(0)
    return FrameAutoencoder(latent_channels=4, widths=(8, 16, 16), encoder_blocks=(0, 1, 0), decoder_blocks=(0, 1, 0))


def psnr(codec: FrameAutoencoder, pictures: torch.Tensor) -> float:
    frames = pictures.permute(0, 3, 1, 2)[None].float() / 255
    with torch.no_grad():
        return float(-10 * (codec.decode(codec.encode(frames)) - frames).square().mean().log10())


def test_trains_measures_and_saves(episodes, tmp_path):
    codec, pictures = small(), episodes.frames()[episodes.held_out]
    before = psnr(codec, pictures)
    budget = Budget(5.0, steps=60, learning_rate=1e-2, warmup_steps=5, ema_decay=0.8, weight_decay=0.0)
    recipe.train(codec, episodes, budget, tmp_path, batch_size=16, seed=0)
    loaded = FrameAutoencoder.from_pretrained(tmp_path)
    assert psnr(loaded, pictures) > before + 5
    with torch.no_grad():
        latents = loaded.encode(episodes.frames().permute(0, 3, 1, 2)[None].float() / 255)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3, 4)), torch.zeros(4), atol=0.1, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3, 4)), torch.ones(4), atol=0.1, rtol=0)
    assert (tmp_path / "checkpoint.pt").is_file()


def test_measured_latents_have_mean_0_and_deviation_1():
    codec = small()
    pictures = [torch.randint(256, (6, 16, 16, 3), dtype=torch.uint8) for _ in range(3)]
    recipe.measure_latents(codec, pictures)
    with torch.no_grad():
        latents = codec.encode(torch.cat(pictures).permute(0, 3, 1, 2)[None].float() / 255)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3, 4)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3, 4)), torch.ones(4), atol=1e-5, rtol=0)


def test_the_command_trains_from_a_folder(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "FrameAutoencoder", small)
    recipe.main(["--data", str(shards), "--out", str(tmp_path / "codec"), "--steps", "2", "--batch-size", "4"])
    assert FrameAutoencoder.from_pretrained(tmp_path / "codec").config.latent_channels == 4


def test_the_command_says_when_there_is_no_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="no shards"):
        recipe.main(["--data", str(tmp_path), "--out", str(tmp_path / "codec")])
