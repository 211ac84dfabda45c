"""The streaming autoencoder: equal to diffusers' own on the whole video, however the video is cut."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from millstream.models.doubling import aligned, interleaved, phases
from millstream.models.wan_vae import CodecState, WanDecoder, WanEncoder

KINDS = {
    "2.1": {"base_dim": 8, "z_dim": 4},
    "2.2": {
        "base_dim": 8,
        "decoder_base_dim": 16,
        "z_dim": 6,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    },
}
FRAMES = 5  # latents: the first, which is special, the second, where time begins to double, and three like all others
SIZE = (32, 48)


def make(kind: str) -> AutoencoderKLWan:
    config = KINDS[kind]
    torch.manual_seed(0)
    mean = torch.randn(config["z_dim"]).tolist()
    std = (torch.rand(config["z_dim"]) + 0.5).tolist()
    vae = AutoencoderKLWan(
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=mean,
        latents_std=std,
        **config,
    )
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.data.uniform_(0.5, 1.5)
    return vae.eval()


@pytest.fixture(scope="module", params=KINDS)
def vae(request):
    return make(request.param)


@pytest.fixture(scope="module")
def latents(vae):
    pixels = vae.config.scale_factor_spatial
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, vae.config.z_dim, FRAMES, SIZE[0] // pixels, SIZE[1] // pixels, generator=generator)


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(1, 1 + 4 * (FRAMES - 1), 3, *SIZE, generator=torch.Generator().manual_seed(2))


def statistics(vae):
    return (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))


@torch.no_grad()
def decoded_whole(vae, latents):
    mean, std = statistics(vae)
    return vae.decode(latents * std + mean).sample.movedim(1, 2) / 2 + 0.5


@torch.no_grad()
def encoded_whole(vae, pictures):
    mean, std = statistics(vae)
    return (vae.encode(pictures.movedim(1, 2) * 2 - 1).latent_dist.mode() - mean) / std


def close(a, b):
    """Within 1e-5 of the largest value."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def cuts(total):
    return st.lists(st.integers(1, total), min_size=1, max_size=total).map(lambda sizes: cut(sizes, total))


def cut(sizes, total):
    parts = []
    for size in sizes:
        parts.append(min(size, total - sum(parts)))
        if sum(parts) == total:
            return parts
    return [*parts, total - sum(parts)]


@pytest.mark.parametrize("step", [1, 2, 3])
@settings(max_examples=4, deadline=None)
@given(sizes=cuts(FRAMES))
def test_any_chunking_of_latents_decodes_to_what_diffusers_makes_of_the_whole(vae, latents, step, sizes):
    decoder = WanDecoder(vae, step)
    state = decoder.begin(*SIZE)
    parts = [decoder.decode(part, state) for part in latents.split(sizes, dim=2)]
    assert parts[0].shape[1] == 4 * sizes[0] - 3
    close(torch.cat(parts, dim=1), decoded_whole(vae, latents))


@pytest.mark.parametrize("step", [1, 3])
@settings(max_examples=4, deadline=None)
@given(sizes=cuts(1 + 4 * (FRAMES - 1)))
def test_any_chunking_of_pictures_encodes_to_what_diffusers_makes_of_the_whole(vae, pictures, step, sizes):
    encoder = WanEncoder(vae, step)
    state = encoder.begin(*SIZE)
    parts = [encoder.encode(part, state) for part in pictures.split(sizes, dim=1)]
    seen = 0
    for size, part in zip(sizes, parts):
        before, seen = 0 if seen == 0 else 1 + (seen - 1) // 4, seen + size
        assert part.shape[2] == 1 + (seen - 1) // 4 - before, "a latent comes as soon as its last picture is there"
    close(torch.cat(parts, dim=2), encoded_whole(vae, pictures))


def test_a_batch_is_its_rows(vae, latents):
    decoder = WanDecoder(vae)
    both = torch.cat([latents, latents.flip(2)])
    state = decoder.begin(*SIZE, batch=2)
    together = torch.cat([decoder.decode(part, state) for part in both.split(2, dim=2)], dim=1)
    for row, alone in zip(together, (latents, latents.flip(2))):
        close(row[None], decoded_whole(vae, alone))


def addresses(state: CodecState):
    return {name: buffer.data_ptr() for name, buffer in state.buffers.items()}


def test_memory_stays_where_it_is(vae, latents, pictures):
    decoder, encoder = WanDecoder(vae), WanEncoder(vae)
    decoding, encoding = decoder.begin(*SIZE), encoder.begin(*SIZE)
    before = addresses(decoding), addresses(encoding), decoder._scratch.data_ptr(), encoder._scratch.data_ptr()
    for _ in range(3):
        decoder.decode(latents, decoding)
        encoder.encode(pictures, encoding)
    assert before == (
        addresses(decoding),
        addresses(encoding),
        decoder._scratch.data_ptr(),
        encoder._scratch.data_ptr(),
    )


def test_two_streams_do_not_touch_each_other_and_a_reset_one_begins_anew(vae, latents):
    decoder = WanDecoder(vae)
    one, two = decoder.begin(*SIZE), decoder.begin(*SIZE)
    first = decoder.decode(latents[:, :, :2], one)
    decoder.decode(latents.flip(2), two)
    parts = [first, decoder.decode(latents[:, :, 2:], one)]
    close(torch.cat(parts, dim=1), decoded_whole(vae, latents))
    two.reset()
    assert torch.equal(decoder.decode(latents[:, :, :2], two), first)


def test_a_restored_state_goes_on_to_the_bit(vae, latents, pictures):
    decoder, encoder = WanDecoder(vae), WanEncoder(vae)
    state, other = decoder.begin(*SIZE), decoder.begin(*SIZE)
    decoder.decode(latents[:, :, :2], state)
    saved = state.snapshot()
    expected = decoder.decode(latents[:, :, 2:], state)
    other.restore(saved)
    assert torch.equal(decoder.decode(latents[:, :, 2:], other), expected)
    state, other = encoder.begin(*SIZE), encoder.begin(*SIZE)
    encoder.encode(pictures[:, :7], state)
    saved = state.snapshot()
    expected = encoder.encode(pictures[:, 7:], state)
    other.restore(saved)
    assert torch.equal(encoder.encode(pictures[:, 7:], other), expected)


def test_a_state_of_another_size_is_refused(vae):
    decoder = WanDecoder(vae)
    with pytest.raises(ValueError, match="saved codec state has"):
        decoder.begin(*SIZE).restore(decoder.begin(64, 64).snapshot())
    with pytest.raises(ValueError, match=r"multiples of \d+ pixels, got 33 x 48"):
        decoder.begin(33, 48)


def test_latents_and_pictures_of_another_shape_are_refused(vae, latents, pictures):
    decoder, encoder = WanDecoder(vae), WanEncoder(vae)
    with pytest.raises(ValueError, match=r"latents must be \[1, \d, F, \d, \d\], got"):
        decoder.decode(latents[:, :3], decoder.begin(*SIZE))
    with pytest.raises(ValueError, match=r"pictures must be \[1, T, 3, 32, 48\], got"):
        encoder.encode(pictures[..., :32], encoder.begin(*SIZE))


@pytest.mark.parametrize("changes", [{"latents_mean": None}, {"latents_std": None}, {"latents_std": [1.0] * 16}])
def test_an_autoencoder_without_its_statistics_is_refused(changes):
    vae = make("2.1")
    vae.register_to_config(**changes)
    with pytest.raises(ValueError, match=r"needs latents_(mean|std) with 4 values, one per latent channel, and has"):
        WanDecoder(vae)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (
            {"latents_mean": [0.0, float("nan"), 0.0, 0.0]},
            "latents_mean .* has nan, which is no finite number, for channel 1",
        ),
        (
            {"latents_std": [1.0, 1.0, float("inf"), 1.0]},
            "latents_std .* has inf, which is no finite number, for channel 2",
        ),
        ({"latents_std": [1.0, 1.0, 1.0, -1.0]}, "latents_std .* has -1.0, which is not above 0, for channel 3"),
        ({"latents_std": [1.0] * 3}, "latents_std .* has 3 values"),
        ({"latents_mean": ["a"] * 4}, "latents_mean .* has 'a', which is no finite number, for channel 0"),
        ({"latents_mean": 0.5}, "latents_mean .* has a float"),
        ({"latents_std": "abcd"}, "latents_std .* has a str"),
    ],
)
def test_statistics_that_are_wrong_are_told(changes, wrong):
    vae = make("2.1")
    vae.register_to_config(**changes)
    with pytest.raises(ValueError, match=f"needs {wrong}"):
        WanDecoder(vae)


def test_the_cache_at_full_size_is_as_large_as_published():
    with torch.device("meta"):
        vae = AutoencoderKLWan()
    decoder = WanDecoder(vae)
    assert sum(place.elements for place in decoder.places(480, 832).values()) == 944_286_720
    assert len(decoder.places(480, 832)) == 32
    assert len(WanEncoder(vae).places(480, 832)) == 24 + 1, "and one for waiting pictures"


@pytest.mark.parametrize("size", [(1, 1), (3, 4)])
@pytest.mark.parametrize("channels", [3, 8])
def test_a_convolution_after_doubling_is_four_before(size, channels):
    x, weight, bias = torch.randn(2, 5, *size), torch.randn(channels, 5, 3, 3), torch.randn(channels)
    doubled = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
    seen = interleaved(F.conv2d(x, phases(weight), bias.repeat(4), padding=1))
    assert seen.is_contiguous(memory_format=torch.channels_last)
    close(seen, F.conv2d(doubled, weight, bias, padding=1))


@pytest.mark.parametrize("kernel", [(3, 3), (3, 3, 3)])
def test_outputs_of_nothing_change_no_other(kernel):
    convolve = F.conv2d if len(kernel) == 2 else F.conv3d
    x, weight, bias = torch.randn(1, 5, *kernel), torch.randn(3, 5, *kernel), torch.randn(3)
    more, more_bias = aligned(weight, bias)
    seen = convolve(x, more, more_bias)
    assert seen.shape[1] == 8
    assert not seen[:, 3:].any()
    close(seen[:, :3], convolve(x, weight, bias))


def test_changed_weights_are_seen_by_the_next_stream_at_the_same_address(vae, latents):
    vae = make("2.2" if vae.config.is_residual else "2.1")
    decoder = WanDecoder(vae)
    decoder.begin(*SIZE)
    before = [part.data_ptr() for pair in decoder.made.values() for part in pair if part is not None]
    for parameter in vae.decoder.parameters():
        parameter.data.mul_(1.1)
    state = decoder.begin(*SIZE)
    assert [part.data_ptr() for pair in decoder.made.values() for part in pair if part is not None] == before
    close(decoder.decode(latents, state), decoded_whole(vae, latents))


def test_bfloat16_stays_near_float32(vae, latents):
    reference = decoded_whole(vae, latents)
    half = make("2.2" if vae.config.is_residual else "2.1").to(torch.bfloat16)
    decoder = WanDecoder(half)
    pictures = decoder.decode(latents, decoder.begin(*SIZE))
    assert pictures.dtype == torch.bfloat16
    assert (pictures.float() - reference).abs().mean() < 0.02
