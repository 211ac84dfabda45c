"""LlamaGen's and VAR's codecs under their published names, against slow loops that share no code of ours."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from millstream.models.checkpoints import load_token_codec
from millstream.models.vqgan import VQGAN, mend_of
from millstream.pipelines.token_networks import PhiloxDraws
from millstream.samplers import Ask, Categorical, Level, Scales, decoding_levels

WIDTHS, BLOCKS, LATENTS, CODES, CHANNELS = (32, 64, 64), 1, 12, 40, 6
SIDES = (1, 2, 3, 4)
Weights = dict[str, Tensor]


def conv(weights: Weights, name: str, out: int, given: int, kernel: int = 3) -> None:
    weights[f"{name}.weight"] = torch.randn(out, given, kernel, kernel) / math.sqrt(given * kernel * kernel)
    weights[f"{name}.bias"] = 0.2 * torch.randn(out)


def norm(weights: Weights, name: str, width: int) -> None:
    weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + 0.3 * torch.randn(width), 0.2 * torch.randn(width)


def resnet(weights: Weights, name: str, given: int, out: int) -> None:
    norm(weights, f"{name}.norm1", given)
    conv(weights, f"{name}.conv1", out, given)
    norm(weights, f"{name}.norm2", out)
    conv(weights, f"{name}.conv2", out, out)
    if given != out:
        conv(weights, f"{name}.nin_shortcut", out, given, 1)


def attention(weights: Weights, name: str, width: int, joined: bool) -> None:
    norm(weights, f"{name}.norm", width)
    for part in ("qkv",) if joined else ("q", "k", "v"):
        conv(weights, f"{name}.{part}", 3 * width if joined else width, width, 1)
    conv(weights, f"{name}.proj_out", width, width, 1)


def published(var: bool) -> Weights:
    torch.manual_seed(0)
    weights: Weights = {"quantize.embedding.weight": torch.randn(CODES, CHANNELS)}
    kernel, last = 3 if var else 1, len(WIDTHS) - 1
    conv(weights, "quant_conv", CHANNELS, LATENTS, kernel)
    conv(weights, "post_quant_conv", LATENTS, CHANNELS, kernel)
    if var:
        for number in range(4):
            conv(weights, f"quantize.quant_resi.qresi_ls.{number}", CHANNELS, CHANNELS)
        weights["quantize.ema_vocab_hit_SV"] = torch.zeros(len(SIDES), CODES)
    else:
        weights["quantize.codebook_used"] = torch.zeros(65536)
    middle = ("block_1", "attn_1", "block_2") if var else ("0", "1", "2")
    for half, ends in (("encoder", (3, LATENTS)), ("decoder", (LATENTS, 3))):
        order = range(len(WIDTHS)) if half == "encoder" else range(last, -1, -1)
        width = WIDTHS[0] if half == "encoder" else WIDTHS[last]
        conv(weights, f"{half}.conv_in", width, ends[0])
        for place, stage in enumerate(order):
            stages = {"encoder": "down", "decoder": "up"}[half] if var else "conv_blocks"
            name = f"{half}.{stages}.{stage if var else place}"
            for block in range(BLOCKS + (half == "decoder")):
                resnet(weights, f"{name}.{'block' if var else 'res'}.{block}", width, WIDTHS[stage])
                width = WIDTHS[stage]
                if stage == last:
                    attention(weights, f"{name}.attn.{block}", width, var)
            if half == "encoder" and stage != last:
                conv(weights, f"{name}.downsample.conv", width, width)
            if half == "decoder" and stage != 0:
                conv(weights, f"{name}.upsample.conv", width, width)
        deepest = WIDTHS[last]
        resnet(weights, f"{half}.mid.{middle[0]}", deepest, deepest)
        attention(weights, f"{half}.mid.{middle[1]}", deepest, var)
        resnet(weights, f"{half}.mid.{middle[2]}", deepest, deepest)
        norm(weights, f"{half}.norm_out", width)
        conv(weights, f"{half}.conv_out", ends[1], width)
    return weights


class Slow:
    """What the published code computes, over its own names."""

    def __init__(self, weights: Weights, var: bool) -> None:
        self.weights, self.var, self.last = weights, var, len(WIDTHS) - 1
        self.middle = ("block_1", "attn_1", "block_2") if var else ("0", "1", "2")

    def conv(self, name: str, x: Tensor, **how: int) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        how.setdefault("padding", weight.shape[-1] // 2)
        return F.conv2d(x, weight, self.weights[f"{name}.bias"], **how)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-6)

    def resnet(self, name: str, x: Tensor) -> Tensor:
        y = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        y = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", y)))
        return y + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.weights else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        y = self.norm(f"{name}.norm", x)
        if self.var:
            q, k, v = self.conv(f"{name}.qkv", y).flatten(2).chunk(3, dim=1)
        else:
            q, k, v = (self.conv(f"{name}.{part}", y).flatten(2) for part in "qkv")
        share = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(dim=-1)
        return x + self.conv(f"{name}.proj_out", (v @ share.transpose(1, 2)).view_as(x))

    def mid(self, half: str, x: Tensor) -> Tensor:
        x = self.attention(f"{half}.mid.{self.middle[1]}", self.resnet(f"{half}.mid.{self.middle[0]}", x))
        return self.resnet(f"{half}.mid.{self.middle[2]}", x)

    def stage(self, name: str, x: Tensor, blocks: int) -> Tensor:
        for block in range(blocks):
            x = self.resnet(f"{name}.{'block' if self.var else 'res'}.{block}", x)
            if f"{name}.attn.{block}.norm.weight" in self.weights:
                x = self.attention(f"{name}.attn.{block}", x)
        return x

    def end(self, half: str, x: Tensor) -> Tensor:
        return self.conv(f"{half}.conv_out", F.silu(self.norm(f"{half}.norm_out", x)))

    def encode(self, pictures: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", pictures)
        for stage in range(len(WIDTHS)):
            name = f"encoder.{'down' if self.var else 'conv_blocks'}.{stage}"
            x = self.stage(name, x, BLOCKS)
            if stage != self.last:
                x = self.conv(f"{name}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        return self.conv("quant_conv", self.end("encoder", self.mid("encoder", x)))

    def decode(self, latents: Tensor) -> Tensor:
        x = self.mid("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", latents)))
        for place in range(len(WIDTHS)):
            name = f"decoder.up.{self.last - place}" if self.var else f"decoder.conv_blocks.{place}"
            x = self.stage(name, x, BLOCKS + 1)
            if place != self.last:
                x = self.conv(f"{name}.upsample.conv", F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.end("decoder", x)


def loaded(weights: Weights, path: Path, **config: object) -> VQGAN:
    save_file({name: value.contiguous() for name, value in weights.items()}, path / "codec.safetensors")
    return load_token_codec(path / "codec.safetensors", config=config)


@torch.no_grad()
def test_llamagen(tmp_path: Path) -> None:
    weights = published(var=False)
    codec, slow = loaded(weights, tmp_path), Slow(weights, var=False)
    pictures = torch.rand(2, 3, 16, 16)
    codes = F.normalize(weights["quantize.embedding.weight"], dim=-1)
    latents = F.normalize(slow.encode(2 * pictures - 1), dim=1)
    wanted = torch.einsum("bchw,vc->bhwv", latents, codes).argmax(dim=-1).flatten(1)
    tokens = codec.encode(pictures)
    assert torch.equal(tokens, wanted)
    assert len(tokens.unique()) > 3
    drawn = slow.decode(codes[tokens].transpose(1, 2).reshape(2, CHANNELS, 4, 4))
    torch.testing.assert_close(codec.decode(tokens), (drawn / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-5)


@torch.no_grad()
def test_var(tmp_path: Path) -> None:
    weights = published(var=True)
    codec, slow = loaded(weights, tmp_path, scale_sides=SIDES), Slow(weights, var=True)
    pictures = torch.rand(2, 3, 16, 16)
    codes, rest, total = weights["quantize.embedding.weight"], slow.encode(2 * pictures - 1), torch.zeros(())
    wanted = []
    for level, side in enumerate(SIDES):
        small = F.adaptive_avg_pool2d(rest, side)
        distance = (small.permute(0, 2, 3, 1)[..., None, :] - codes).square().sum(-1)
        index = distance.argmin(-1)
        wanted.append(index.flatten(1))
        spread = codes[index].permute(0, 3, 1, 2)
        if side != SIDES[-1]:
            spread = F.interpolate(spread, size=(4, 4), mode="bicubic")
        phi = min(range(4), key=lambda number: abs(1 / 12 + number * (10 / 12) / 3 - level / 3))
        mended = slow.conv(f"quantize.quant_resi.qresi_ls.{phi}", spread)
        rest, total = rest - (spread + mended) / 2, total + (spread + mended) / 2
    tokens = codec.encode(pictures)
    assert torch.equal(tokens, torch.cat(wanted, dim=1))
    torch.testing.assert_close(codec.latents_of(tokens), total, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.decode(tokens), (slow.decode(total) / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-5)


@torch.no_grad()
def test_next_scale_decoding_paints_on_the_canvas_that_the_codec_reads(tmp_path: Path) -> None:
    codec = loaded(published(var=True), tmp_path, scale_sides=SIDES)
    levels = Scales(SIDES, codec.embed, codec.mend, codec.codes, CHANNELS)

    def network(level: int, given: Tensor | None, ask: Ask) -> Tensor:
        return torch.randn(2, SIDES[level] ** 2, CODES, generator=torch.Generator().manual_seed(level))

    plan, draws = [Level(Categorical())] * len(SIDES), PhiloxDraws(torch.tensor([1, 2]))
    done = list(decoding_levels(network, levels, plan, batch=2, draws=draws))
    tokens = torch.cat([level.tokens for level in done], dim=1)
    torch.testing.assert_close(codec.latents_of(tokens), done[-1].canvas, rtol=0, atol=1e-5)


def test_published_sizes() -> None:
    """LlamaGen's 72 M parameters; VAR's 109 M."""
    with torch.device("meta"):
        llamagen = VQGAN()
        var = VQGAN(
            (160, 160, 320, 320, 640),
            2,
            32,
            4096,
            32,
            unit_codes=False,
            kernel=3,
            scale_sides=(1, 2, 16),
            shared_mends=4,
        )
    counts = [sum(parameter.numel() for parameter in codec.parameters()) for codec in (llamagen, var)]
    assert counts == pytest.approx([72e6, 109e6], rel=0.02)


def test_levels_share_mends_as_published() -> None:
    """Levels 2 and 7 of ten lie half-way between two of four convolutions, and NumPy's rounding decides."""
    ticks = np.linspace(1 / 3 / 4, 1 - 1 / 3 / 4, 4)
    wanted = [np.argmin(np.abs(ticks - level / 9)).item() for level in range(10)]
    assert [mend_of(level, 10, 4) for level in range(10)] == wanted
    assert sorted(set(wanted)) == [0, 1, 2, 3]
    assert [mend_of(level, 4, 2) for level in range(4)] == [0, 0, 1, 1]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no codec of LlamaGen or VAR, but a\.weight"):
        load_token_codec(tmp_path / "other.safetensors")
    weights = published(var=False)
    codec = loaded(weights, tmp_path)
    with pytest.raises(ValueError, match=r"H and W multiples of 4, got \[1, 3, 10, 16\]"):
        codec.encode(torch.rand(1, 3, 10, 16))
    with pytest.raises(ValueError, match="a square number, got 5"):
        codec.decode(torch.zeros(1, 5, dtype=torch.int64))
    del weights["decoder.mid.1.q.weight"]
    with pytest.raises(ValueError, match=r"1 missing: decoder\.mid_block\.attentions\.0\.to_q\.weight"):
        loaded(weights, tmp_path)
    del weights["quant_conv.weight"]
    with pytest.raises(ValueError, match=r"not a whole codec: 'to_codes\.weight' is missing"):
        loaded(weights, tmp_path)
    pyramid = loaded(published(var=True), tmp_path, scale_sides=SIDES)
    with pytest.raises(ValueError, match="of pictures 16 x 16, got"):
        pyramid.encode(torch.rand(1, 3, 8, 8))
