"""The frame codec: every frame on its own, and latents that are normalised by what was measured."""

from __future__ import annotations

import copy

import pytest
import torch

from millstream.models.frame_codec import FrameAutoencoder


@pytest.fixture(scope="module")
def codec() -> FrameAutoencoder:
    torch.manual_seed(0)
    codec = FrameAutoencoder(latent_channels=4, widths=(8, 16, 24)).eval()
    codec.latent_mean.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    codec.latent_std.copy_(torch.tensor([0.5, 2.0, 1.0, 3.0]))
    return codec


@torch.no_grad()
def test_shapes_and_range(codec):
    frames = torch.rand(2, 5, 3, 16, 32)
    latents = codec.encode(frames)
    assert latents.shape == (2, 4, 5, 2, 4)
    decoded = codec.decode(latents * 100)
    assert decoded.shape == frames.shape
    assert decoded.min() == 0
    assert decoded.max() == 1


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [5, 1], [3, 2, 1]])
@torch.no_grad()
def test_any_chunking_equals_the_whole(codec, sizes):
    frames = torch.rand(2, 6, 3, 16, 16)
    latents = codec.encode(frames)
    parts = [codec.encode(part) for part in frames.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=2), latents, atol=1e-5, rtol=1e-5)
    parts = [codec.decode(part) for part in latents.split(sizes, dim=2)]
    torch.testing.assert_close(torch.cat(parts, dim=1), codec.decode(latents), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_latents_are_normalised_and_decode_undoes_it(codec):
    frames = torch.rand(1, 2, 3, 16, 16)
    raw = codec.encode_raw(frames[0])
    mean, std = codec.latent_mean.view(-1, 1, 1), codec.latent_std.view(-1, 1, 1)
    latents = codec.encode(frames)
    torch.testing.assert_close(latents[0].movedim(1, 0), (raw - mean) / std)
    torch.testing.assert_close(codec.decode(latents)[0], codec.decode_raw(raw).clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_drawing_and_learning_compute_the_same(codec, tmp_path):
    codec = copy.deepcopy(codec)
    latents, frames = torch.randn(1, 4, 2, 2, 4), torch.rand(1, 2, 3, 16, 32)
    learnt = codec.decode(latents), codec.encode(frames)
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    codec.lay_out_weights()
    with torch.no_grad():
        for drawn, expected in zip((codec.decode(latents), codec.encode(frames)), learnt):
            torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in codec.state_dict().items())
    codec.save_pretrained(tmp_path)
    loaded = FrameAutoencoder.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in before.items())


@torch.no_grad()
def test_save_and_load_keep_the_measured_latents(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    loaded = FrameAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.latent_mean, codec.latent_mean)
    assert torch.equal(loaded.latent_std, codec.latent_std)
    frames = torch.rand(1, 2, 3, 16, 16)
    assert torch.equal(loaded.encode(frames), codec.encode(frames))


@pytest.mark.parametrize("shape", [(5, 3, 16, 16), (1, 3, 5, 16, 16), (1, 1, 3, 12, 16), (1, 1, 3, 16, 20)])
def test_frames_of_another_shape_are_refused(codec, shape):
    with pytest.raises(ValueError, match=r"H and W multiples of 8, got .*; resize them first") as refusal:
        codec.encode(torch.zeros(shape))
    assert str(shape) in str(refusal.value)
