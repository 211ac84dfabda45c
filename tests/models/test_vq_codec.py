"""Pictures to tokens and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from millstream.models.vq_codec import VQAutoencoder
from millstream.samplers.levels import Scales


def codec(**changes: object) -> VQAutoencoder:
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "codebook_size": 32, "latent_channels": 4, "widths": (8, 16), **changes}
    return VQAutoencoder(**sizes).eval()  # type: ignore[arg-type]


@pytest.fixture
def pictures() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_tokens_are_the_nearest_codes(pictures: Tensor) -> None:
    net = codec()
    latents = net.encode_raw(pictures)
    tokens = net.encode(pictures)
    assert tokens.shape == (2, 16)
    book = net.codebook()
    for row in range(2):
        for place, point in enumerate(latents[row].flatten(1).T):
            assert int((book - point).square().sum(1).argmin()) == int(tokens[row, place])


def test_the_decoder_sees_what_the_tokens_mean(pictures: Tensor) -> None:
    for net in (codec(), codec(scale_sides=(1, 2, 4))):
        quantized = net.quantize(net.encode_raw(pictures))
        assert torch.equal(quantized.tokens, net.encode(pictures))
        torch.testing.assert_close(net.latents_of(quantized.tokens), quantized.latents, atol=1e-5, rtol=1e-5)
        drawn = net.decode(quantized.tokens)
        assert drawn.shape == pictures.shape
        assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1


def test_multi_scale_tokens_equal_the_published_loop(pictures: Tensor) -> None:
    net = codec(scale_sides=(1, 2, 4))
    latents = net.encode_raw(pictures)
    left, found = latents, []
    for level, side in enumerate((1, 2, 4)):
        small = F.adaptive_avg_pool2d(left, side)
        distance = (small.permute(0, 2, 3, 1)[..., None, :] - net.codebook()).square().sum(-1)
        index = distance.argmin(-1)
        found.append(index.flatten(1))
        wide = net.codebook()[index].permute(0, 3, 1, 2)
        wide = wide if side == 4 else F.interpolate(wide, (4, 4), mode="bicubic")
        left = left - (0.5 * wide + 0.5 * net.mends[level](wide))
    assert torch.equal(torch.cat(found, 1), net.encode(pictures))


def test_scales_of_the_sampler_fold_as_the_codec_does(pictures: Tensor) -> None:
    net = codec(scale_sides=(1, 2, 4))
    tokens = net.encode(pictures)
    levels = Scales(net.sides, net.embed, net.mend, net.codes, 4)
    canvas = levels.blank(2)
    for level, part in enumerate(tokens.split(list(levels.sizes), dim=1)):
        canvas = levels.fold(level, part, canvas)
    torch.testing.assert_close(canvas, net.latents_of(tokens))


def test_gradients_pass_straight_through_and_move_every_code(pictures: Tensor) -> None:
    net = codec()
    quantized = net.quantize(net.encode_raw(pictures))
    (net.decode_raw(quantized.latents).square().mean() + quantized.loss).backward()
    assert next(net.encoder.parameters()).grad.abs().sum() > 0  # type: ignore[union-attr]
    before = net.codebook()
    torch.optim.SGD(net.code_projection.parameters(), 1.0).step()
    assert bool(((net.codebook() - before).abs().sum(dim=1) > 0).all()), "a code did not move"


def test_training_brings_the_picture_back(pictures: Tensor) -> None:
    net = codec().train()
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    smooth = F.interpolate(pictures[:, :, ::4, ::4], (16, 16), mode="bilinear")
    losses = []
    for _ in range(40):
        quantized = net.quantize(net.encode_raw(smooth))
        error = F.mse_loss(net.decode_raw(quantized.latents), smooth)
        (error + quantized.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(error.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_packed_weights_keep_tokens_nearly_as_they_were(tmp_path: Path, pictures: Tensor) -> None:
    net = codec(codebook_size=2048)
    net.save_packed(tmp_path)
    loaded = VQAutoencoder.from_pretrained(tmp_path)
    tokens = net.encode(pictures)
    assert (loaded.decode(tokens) - net.decode(tokens)).abs().max() < 0.05


def test_wrong_sizes_are_refused(pictures: Tensor) -> None:
    with pytest.raises(ValueError, match=r"pictures must be \[B, 3, 16, 16\], got \[2, 3, 8, 8\]"):
        codec().encode(pictures[..., :8, :8])
    with pytest.raises(ValueError, match="multiple of 4"):
        codec(sample_size=18)
    with pytest.raises(ValueError, match="must grow and end at the latents' side 4, got \\[1, 2, 3\\]"):
        codec(scale_sides=(1, 2, 3))
