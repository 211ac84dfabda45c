"""The codec on any pieces equals the codec on the whole; its codes go both ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.models.audio_codec import AudioCodec

TINY = {
    "latent_channels": 8,
    "step": 10,
    "window": 40,
    "ratio": 4,
    "bands": 8,
    "encoder_dim": 8,
    "decoder_dim": 8,
    "levels": 3,
    "codebook_size": 16,
}


@pytest.fixture(scope="module")
def codec() -> AudioCodec:
    torch.manual_seed(0)
    made = AudioCodec(**TINY).eval()
    made.latent_mean.normal_()
    made.latent_std.uniform_(0.5, 2)
    return made


@given(pieces=st.lists(st.integers(1, 4), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_any_pieces_equal_the_whole(codec: AudioCodec, pieces: list[int]) -> None:
    waveform = torch.randn(2, 1, sum(pieces) * codec.hop)
    latents = codec.encode(waveform)
    whole = codec.decode(latents)
    state = codec.begin(rows=2)
    heard = [codec.encode_step(part, state) for part in waveform.split([n * codec.hop for n in pieces], dim=-1)]
    made = [codec.decode_step(part, state) for part in latents.split(pieces, dim=-1)]
    torch.testing.assert_close(torch.cat(heard, -1), latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat(made, -1), whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_sample_is_not_heard_before_it_comes(codec: AudioCodec) -> None:
    waveform = torch.randn(1, 1, 6 * codec.hop)
    changed = waveform.clone()
    changed[..., 3 * codec.hop :] = 0
    before, after = codec.encode(waveform), codec.encode(changed)
    assert torch.equal(before[..., :3], after[..., :3])
    assert not torch.allclose(before[..., 3:], after[..., 3:])


@torch.no_grad()
def test_codes_come_back_and_each_level_comes_nearer(codec: AudioCodec) -> None:
    for level in codec.quantizer.levels:  # a codebook that spans what it sees, as training makes it
        level.down.weight.copy_(torch.eye(16, 8))
        level.down.bias.zero_()
        level.up.weight.copy_(torch.eye(8, 16))
        level.up.bias.zero_()
        level.codes[:, 8:] = 0
        level.codes[0] = 0
        level.code_projection.bias.zero_()
    latents = torch.randn(2, 8, 5)
    codes = codec.quantize(latents)
    assert codes.shape == (2, 3, 5)
    assert codes.dtype == torch.int64
    raw = codec._raw(latents)
    errors = [float((codec.quantizer.decode(codes[:, :q]) - raw).square().mean()) for q in (1, 2, 3)]
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[0] > errors[2]
    assert torch.equal(codec.quantize(codec.dequantize(codes[:, :1]))[:, 0], codes[:, 0])


@torch.no_grad()
def test_rows_are_reset_saved_and_restored_alone(codec: AudioCodec) -> None:
    state, latents = codec.begin(rows=2), torch.randn(2, 8, 4)
    codec.decode_step(latents, state)
    saved, size = state.snapshot(1), state.bytes
    state.reset(0)
    fresh = codec.decode_step(latents, state)
    assert torch.allclose(fresh[:1], codec.decode(latents[:1]), atol=1e-6)
    state.restore(1, saved)
    assert torch.allclose(codec.decode_step(latents, state)[1], fresh[1], atol=1e-6)
    assert state.bytes == size
    one = codec.begin(rows=1)
    one.restore(0, saved)
    assert torch.allclose(codec.decode_step(latents[1:], one)[0], fresh[1], atol=1e-6)


def test_refusals_say_what_to_do(codec: AudioCodec) -> None:
    with pytest.raises(ValueError, match="multiple of 40 samples, got 41"):
        codec.encode_step(torch.zeros(1, 1, 41), codec.begin())
    with pytest.raises(ValueError, match=r"latents must be \[B, 8, length\], got \[1, 7, 3\]"):
        codec.decode(torch.zeros(1, 7, 3))
    with pytest.raises(ValueError, match="4 steps or more, whole ones"):
        AudioCodec(**(TINY | {"window": 36}))


def test_packed_sounds_as_unpacked(codec: AudioCodec, tmp_path) -> None:
    codec.save_packed(tmp_path)
    packed = AudioCodec.from_pretrained(tmp_path)
    latents = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (packed.decode(latents) - codec.decode(latents)).abs().max() < 0.02
