"""The tiny decoder: any chunking equals a plain loop over frames, written here anew."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from millstream.models.tiny_vae import Grow, MemoryBlock, TinyVideoDecoder

SIZE = (32, 48)


@pytest.fixture(scope="module", params=[1, 2])
def tiny(request):
    torch.manual_seed(0)
    return TinyVideoDecoder(4, request.param, (12, 10, 8, 6)).eval()


@pytest.fixture
def latents(tiny):
    return torch.randn(1, 4, 5, SIZE[0] // tiny.pixels, SIZE[1] // tiny.pixels)


@torch.no_grad()
def plain(tiny, latents):
    """Frame after frame and layer after layer, each memory block given the frame it saw last."""
    frames = [latents[:, :, i] for i in range(latents.shape[2])]
    for layer in tiny.decoder:
        if isinstance(layer, MemoryBlock):
            before = [torch.zeros_like(frames[0]), *frames[:-1]]
            frames = [F.relu(layer.conv(torch.cat([x, past], 1)) + x) for x, past in zip(frames, before)]
        elif isinstance(layer, Grow):
            frames = [part for x in frames for part in layer.conv(x).chunk(layer.times, dim=1)]
        else:
            frames = [layer(x) for x in frames]
    pictures = [F.pixel_shuffle(x, tiny.config.patch_size).clamp(0, 1) for x in frames]
    return torch.stack(pictures[3:], dim=1)


@pytest.mark.parametrize("sizes", [[5], [1, 1, 1, 1, 1], [3, 2], [1, 4]])
def test_any_chunking_equals_the_plain_loop(tiny, latents, sizes):
    state = tiny.begin(*SIZE)
    before = {name: buffer.data_ptr() for name, buffer in state.buffers.items()}
    parts = [tiny.decode(part, state) for part in latents.split(sizes, dim=2)]
    assert parts[0].shape == (1, 4 * sizes[0] - 3, 3, *SIZE)
    torch.testing.assert_close(torch.cat(parts, dim=1), plain(tiny, latents), atol=1e-6, rtol=1e-5)
    assert {name: buffer.data_ptr() for name, buffer in state.buffers.items()} == before


def test_a_restored_state_goes_on_to_the_bit(tiny, latents):
    state, other = tiny.begin(*SIZE), tiny.begin(*SIZE)
    tiny.decode(latents[:, :, :2], state)
    saved = state.snapshot()
    expected = tiny.decode(latents[:, :, 2:], state)
    other.restore(saved)
    assert torch.equal(tiny.decode(latents[:, :, 2:], other), expected)


def test_what_does_not_fit_is_refused(tiny, latents):
    with pytest.raises(ValueError, match=r"latents must be \[1, 4, F, \d, \d\], got \[1, 3"):
        tiny.decode(latents[:, :3], tiny.begin(*SIZE))
    with pytest.raises(ValueError, match="multiples of"):
        tiny.begin(30, 48)


def test_saved_and_loaded_it_decodes_the_same(tiny, latents, tmp_path):
    tiny.save_pretrained(tmp_path)
    loaded = TinyVideoDecoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.decode(latents, loaded.begin(*SIZE)), tiny.decode(latents, tiny.begin(*SIZE)))


def test_the_layout_is_the_published_one():
    """Names and shapes of `taew2_1.pth`, as its public code builds them."""
    with torch.device("meta"):
        names = {name: tuple(value.shape) for name, value in TinyVideoDecoder().state_dict().items()}
    assert names["decoder.1.weight"] == (256, 16, 3, 3)
    assert names["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    assert names["decoder.7.conv.weight"] == (256, 256, 1, 1)
    assert names["decoder.8.weight"] == (128, 256, 3, 3)
    assert names["decoder.13.conv.weight"] == (256, 128, 1, 1)
    assert names["decoder.19.conv.weight"] == (128, 64, 1, 1)
    assert names["decoder.20.weight"] == (64, 64, 3, 3)
    assert names["decoder.22.weight"] == (3, 64, 3, 3)
    assert len(names) == 2 + 9 * 6 + 3 * 2 + 2
