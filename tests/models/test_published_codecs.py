"""Mimi, EnCodec and DAC: pieces equal the whole that transformers computes, and folders load by what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel, MimiConfig, MimiModel

from millstream.models.published_codecs import PublishedCodec, load_codec, wrap_codec

KINDS = ("mimi", "encodec", "dac")


def make(kind: str) -> PublishedCodec:
    torch.manual_seed(0)
    if kind == "mimi":
        config = MimiConfig(
            sampling_rate=400,
            hidden_size=16,
            num_filters=4,
            upsampling_ratios=[4, 2, 2],
            codebook_size=16,
            codebook_dim=8,
            vector_quantization_hidden_dimension=8,
            num_quantizers=4,
            upsample_groups=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            intermediate_size=16,
            sliding_window=5,
            layer_scale_initial_scale=0.5,
        )
        model: torch.nn.Module = MimiModel(config)
    elif kind == "encodec":
        config = EncodecConfig(
            hidden_size=16,
            num_filters=4,
            upsampling_ratios=[4, 2],
            codebook_size=16,
            codebook_dim=16,
            target_bandwidths=[30.0, 60.0],
        )
        model = EncodecModel(config)
    else:
        config = DacConfig(
            encoder_hidden_size=4,
            decoder_hidden_size=16,
            downsampling_ratios=[2, 5],
            n_codebooks=3,
            codebook_size=16,
        )
        model = DacModel(config)
    for name, buffer in model.named_buffers():
        if name.endswith(("embed_sum", "embed")):
            buffer.normal_()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrap_codec(model)


@pytest.fixture(scope="module")
def codecs() -> dict[str, PublishedCodec]:
    return {kind: make(kind) for kind in KINDS}


def pieces_of(x: Tensor, sizes: Sequence[int], unit: int) -> Sequence[Tensor]:
    return x.split([size * unit for size in sizes], dim=-1)


def assert_same(made: Tensor, wanted: Tensor) -> None:
    """To 1e-5 of full scale."""
    torch.testing.assert_close(made, wanted, atol=1e-5 * max(1.0, float(wanted.abs().max())), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [[1] * 40, [3, 1, 5, 2, 29], [40], [2]])
@torch.no_grad()
def test_any_pieces_equal_the_whole(codecs: dict[str, PublishedCodec], kind: str, pieces: list[int]) -> None:
    codec, state = codecs[kind], codecs[kind].begin(rows=2)
    waveform = torch.randn(2, 1, sum(pieces) * codec.hop)
    latents = codec.encode(waveform)
    whole = codec.decode(latents)
    assert latents.shape == (2, codec.latent_channels, sum(pieces))
    for _ in range(2):  # the rest leaves a state as new
        heard = [codec.encode_step(piece, state) for piece in pieces_of(waveform, pieces, codec.hop)]
        made = [codec.decode_step(piece, state) for piece in pieces_of(latents, pieces, 1)]
        heard, made = [*heard, codec.encode_rest(state)], [*made, codec.decode_rest(state)]
        assert_same(torch.cat(heard, -1), latents)
        assert_same(torch.cat(made, -1), whole)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_whole_is_what_transformers_makes(codecs: dict[str, PublishedCodec], kind: str) -> None:
    codec = codecs[kind]
    waveform = torch.randn(1, 1, 24 * codec.hop)
    codes = codec.quantize(codec.encode(waveform))
    sound = codec.decode(codec.dequantize(codes))
    model = codec.model
    if kind == "mimi":
        wanted = model.encode(waveform).audio_codes
        decoded = model.decode(wanted).audio_values
    elif kind == "encodec":
        out = model.encode(waveform, bandwidth=model.config.target_bandwidths[-1])
        wanted, decoded = out.audio_codes[0], model.decode(out.audio_codes, out.audio_scales).audio_values
    else:
        wanted = model.encode(waveform).audio_codes
        decoded = model.decode(audio_codes=wanted).audio_values
    assert codes.unique().numel() > 4, "a test of one code proves nothing"
    assert torch.equal(codes, wanted)
    torch.testing.assert_close(sound.flatten(), decoded.flatten())


@torch.no_grad()
def test_frames_are_held_back_as_stated(codecs: dict[str, PublishedCodec]) -> None:
    assert codecs["mimi"].held == (0, 0)
    assert codecs["encodec"].held == (6, 6)
    for codec in codecs.values():
        state, late = codec.begin(), 40
        heard = [codec.encode_step(torch.randn(1, 1, codec.hop), state).shape[-1] for _ in range(late)]
        made = [codec.decode_step(torch.randn(1, codec.latent_channels, 1), state).shape[-1] for _ in range(late)]
        for given, held, unit in ((heard, codec.held[0], 1), (made, codec.held[1], codec.hop)):
            assert given[:held] == [0] * held
            assert given[-1] == unit
        assert not heard[: codec.held[0]] or heard[codec.held[0]] > 0


@torch.no_grad()
def test_the_reach_is_what_a_frame_depends_on(codecs: dict[str, PublishedCodec]) -> None:
    """A bound that is too small would be wrong somewhere; one that is far too large would cost time."""
    codec = codecs["dac"]
    held = codec.held[0]
    waveform = torch.randn(1, 1, 60 * codec.hop)
    changed = waveform.clone()
    changed[..., 30 * codec.hop : 31 * codec.hop] += 1
    frames = (codec.encode(waveform) - codec.encode(changed)).abs().amax(1)[0].nonzero()[:, 0]
    assert 30 - held <= int(frames.min()) <= 30 - held + 2


@torch.no_grad()
def test_memory_is_fixed_and_rows_keep_apart(codecs: dict[str, PublishedCodec]) -> None:
    codec = codecs["mimi"]
    state, waveform = codec.begin(rows=2), torch.randn(2, 1, 12 * codec.hop)
    addresses = {name: tensor.data_ptr() for name, tensor in state.tensors.items()}
    whole = codec.encode(waveform)
    heard = [codec.encode_step(piece, state) for piece in waveform[..., : 6 * codec.hop].split(codec.hop, -1)]
    saved = state.snapshot(1)
    other = codec.begin()
    other.restore(0, saved)
    rest = codec.encode_step(waveform[1:, :, 6 * codec.hop :], other)
    assert_same(torch.cat([*(part[1:] for part in heard), rest], -1), whole[1:])
    assert addresses == {name: tensor.data_ptr() for name, tensor in state.tensors.items()}
    state.reset(0)
    with pytest.raises(ValueError, match=r"rows must be equally far into their start, got \[0, 6\] frames; step rows"):
        codec.encode_step(waveform[..., : codec.hop], state)
    part = state.take([0])
    assert_same(codec.encode_step(waveform[:1, :, : codec.hop], part), whole[:1, :, :1])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_folders_load_by_what_they_say(codecs: dict[str, PublishedCodec], kind: str, tmp_path: Path) -> None:
    codecs[kind].model.save_pretrained(tmp_path)
    loaded = load_codec(tmp_path)
    waveform = torch.randn(1, 1, 9 * loaded.hop)
    torch.testing.assert_close(loaded.encode(waveform), codecs[kind].encode(waveform), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "model", "hop", "rate", "held"),
    [
        (MimiConfig(), MimiModel, 1920, 12.5, (0, 0)),
        (EncodecConfig(), EncodecModel, 320, 75, (6, 6)),
        (DacConfig(), DacModel, 512, 31.25, (8, 10)),
    ],
)
def test_published_sizes(config: object, model: type, hop: int, rate: float, held: tuple[int, int]) -> None:
    with torch.device("meta"):
        codec = wrap_codec(model(config))
    assert (codec.hop, codec.frame_rate, codec.held) == (hop, rate, held)


def test_refusals(codecs: dict[str, PublishedCodec], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder of a mimi, encodec or dac model, got no config"):
        load_codec(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="got model_type 'bert'"):
        load_codec(tmp_path)
    with pytest.raises(TypeError, match="MimiModel, EncodecModel or DacModel, got Linear"):
        wrap_codec(torch.nn.Linear(1, 1))
    config = EncodecConfig(num_filters=2, hidden_size=8, use_causal_conv=False, norm_type="time_group_norm")
    with pytest.raises(ValueError, match="streaming needs causal convolutions and no norm over time, got use_causal"):
        wrap_codec(EncodecModel(config))
    codec = codecs["mimi"]
    with pytest.raises(ValueError, match=f"a piece must be a multiple of {codec.hop} samples, got 3"):
        codec.encode_step(torch.zeros(1, 1, 3), codec.begin())
    with pytest.raises(ValueError, match=r"latents must be \[B, 16, length\], got \[1, 3, 2\]"):
        codec.decode_step(torch.zeros(1, 3, 2), codec.begin())
