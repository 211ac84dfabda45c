"""Every family of token model draws by one call: next scale and continuous tokens, with small random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

import millstream as ms
from millstream.models.flow_head import FlowHead
from millstream.models.text_encoder import ByteTextEncoder
from millstream.models.token_transformer import TokenTransformer
from millstream.models.vq_codec import VQAutoencoder
from millstream.pipelines.token_networks import PhiloxDraws
from millstream.samplers import Categorical, Level, Scales, TokenSampler, decoding_levels, level_weights

SIDES, V, CHANNELS = (1, 2, 4), 40, 4
N = sum(side * side for side in SIDES)
FAMILIES: dict[str, dict[str, Any]] = {
    "VAR": {"kind": "scales", "scale_sides": SIDES},
    "M-VAR": {"kind": "scales", "scale_sides": SIDES, "scale_mixing": "linear"},
    "MAR": {"kind": "masked"},
    "MAR, random order": {"kind": "two_pass", "num_cross_layers": 2},
    "MAR, raster": {"kind": "causal"},
    "LINA": {"kind": "masked", "attention": "lina", "learned_positions": True},
}
CONTINUOUS = [name for name, config in FAMILIES.items() if config["kind"] != "scales"]


def filled(net: Any) -> Any:
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def small_kl(channels: int = CHANNELS) -> AutoencoderKL:
    shape: dict[str, Any] = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "sample_size": 16}
    shape |= {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return AutoencoderKL(
        **shape,
        latent_channels=channels,
        scaling_factor=0.5,
    ).eval()


def parts(family: str) -> dict[str, Any]:
    torch.manual_seed(0)
    config: dict[str, Any] = {"num_cross_layers": 0, "token_channels": CHANNELS, **FAMILIES[family]}
    sizes: dict[str, Any] = {"vocab_size": V, "grid": (4, 4), "dim": 32, "num_heads": 2, "ffn_dim": 48, "num_layers": 2}
    made: dict[str, Any] = {
        "transformer": filled(TokenTransformer(**sizes, text_dim=16, **config)),
        "text_encoder": ByteTextEncoder(dim=16, tokens=4, layers=1, max_bytes=32).eval(),
        "scheduler": TokenSampler(num_inference_steps=5, curve="cosine", flow_steps=4),
    }
    if family in CONTINUOUS:
        head = filled(FlowHead(channels=CHANNELS, condition_dim=32, dim=16, layers=1))
        return {**made, "codec": small_kl(), "flow_head": head}
    return {**made, "codec": VQAutoencoder(16, V, CHANNELS, (8, 16), (1, 1), (1, 1), scale_sides=SIDES).eval()}


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(family: str, **other: Any) -> Any:
    return quiet(ms.ImagePipeline(**{**parts(family), **other}))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(pipe: Any, prompt: Any = "an apple", seed: int = 0, **given: Any) -> Tensor:
    return pipe(prompt, generator=seeded(seed), output_type="latent", **given).images


@pytest.mark.parametrize("family", FAMILIES)
def test_it_draws_is_saved_and_draws_the_same(family: str, tmp_path: Path) -> None:
    pipe = pipeline(family)
    tokens = drawn(pipe)
    assert tokens.shape == ((1, 16, CHANNELS) if family in CONTINUOUS else (1, N))
    assert pipe("an apple", num_images_per_prompt=2).images[1].size == (16, 16)
    assert not torch.equal(tokens, drawn(pipe, seed=1))
    assert not torch.equal(tokens, drawn(pipe, "a zebra"))
    assert not torch.equal(tokens, drawn(pipe, guidance_scale=50.0))
    pair = drawn(pipe, num_images_per_prompt=2)
    torch.testing.assert_close(pair[:1], tokens, atol=1e-4, rtol=1e-4)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(drawn(quiet(ms.ImagePipeline.from_pretrained(tmp_path))), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_previews_lead_to_the_picture(family: str) -> None:
    pipe = pipeline(family)
    steps = list(pipe.stream("an apple", generator=seeded()))
    decided = [int(step.known.sum()) for step in steps]
    assert decided == ([1, 5, N] if family not in CONTINUOUS else sorted(set(decided)))
    assert decided[-1] == steps[-1].known.numel()
    previews = [step.preview() for step in steps]
    assert all(preview.shape == (1, 3, 16, 16) for preview in previews)
    assert not torch.equal(previews[0], previews[-1])
    if family in CONTINUOUS:
        assert (previews[0] == 1).all(dim=1).any(), "white where nothing is decided"
    else:
        assert (previews[0] < 1).all(dim=1).any(), "whole from the first map on"
    whole = pipe("an apple", generator=seeded(), output_type="pt").images
    assert torch.equal(previews[-1], whole)
    assert torch.equal(steps[0].tokens[steps[0].known], steps[-1].tokens[steps[0].known])


@torch.no_grad()
def test_a_next_scale_picture_is_that_of_the_sampler() -> None:
    pipe = pipeline("VAR")
    text = torch.cat([pipe.text_encoder.encode([words]) for words in ("an apple", "")])
    codec, cache = pipe.codec, pipe.transformer.begin(text)
    levels = Scales(SIDES, codec.embed, codec.mend, codec.codebook(), CHANNELS)
    seeds = torch.randint(2**63 - 1, (1,), generator=seeded())
    done = decoding_levels(
        lambda level, given, ask: pipe.transformer.predict_scale(
            level, None if given is None else given.repeat(2, 1, 1), cache
        ),
        levels,
        [Level(Categorical(0.5))] * 3,
        batch=1,
        draws=PhiloxDraws(seeds),
        guidance=level_weights(3.0, 3),
    )
    wanted = torch.cat([level.tokens for level in done], dim=1)
    assert torch.equal(drawn(pipe, guidance_scale=4.0, temperature=0.5), wanted)


@pytest.mark.parametrize("family", [name for name in CONTINUOUS if name != "MAR, raster"])
def test_continuous_tokens_are_painted_into_a_picture(family: str) -> None:
    pipe = pipeline(family)
    picture, mask = torch.rand(3, 16, 16, generator=seeded(5)), torch.zeros(16, 16)
    mask[4:9, 6:12] = 1
    given: dict[str, Any] = {"image": picture, "mask_image": mask, "generator": seeded()}
    (painted,) = pipe("an apple", output_type="pt", **given).images
    assert torch.equal(painted[:, mask == 0], picture[:, mask == 0])
    assert (painted - picture)[:, mask == 1].abs().max() > 0.05
    (step, *_) = pipe.stream("an apple", **given)
    latents = pipe.codec.encode(2 * picture.masked_fill(mask == 1, 1.0)[None] - 1).latent_dist.mode() * 0.5
    kept = torch.ones(4, 4, dtype=torch.bool)
    kept[1:3, 1:3] = False
    torch.testing.assert_close(step.tokens[0, kept.flatten()], latents[0].flatten(1).T[kept.flatten()])


def test_a_flow_is_near_what_more_of_its_steps_give() -> None:
    few, many, most = (
        drawn(pipeline("MAR", scheduler=TokenSampler(num_inference_steps=5, flow_steps=steps)), guidance_scale=1.0)
        for steps in (1, 20, 40)
    )
    assert (many - most).abs().mean() < 0.2 * (few - most).abs().mean()


def test_what_a_family_cannot_do_is_told() -> None:
    hole = {"image": torch.rand(3, 16, 16), "mask_image": torch.eye(16)}
    for family, message, given in [
        ("VAR", "draws its 3 maps one after the other", {"order": "random"}),
        ("VAR", "leave out order and num_inference_steps, got None and 5", {"num_inference_steps": 5}),
        ("VAR", "leave refresh at 1, got 2", {"refresh": 2}),
        ("VAR", "a next-scale model cannot draw into a picture", hole),
        ("MAR", 'of continuous tokens draws in order "random" or "raster" alone, got \'masked\'', {"order": "masked"}),
        ("MAR, raster", "a causal model cannot draw into a picture", hole),
        ("LINA", "linear attention keeps no keys that could be cached", {"refresh": 2}),
    ]:
        with pytest.raises(ValueError, match=message):
            drawn(pipeline(family), **given)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    var, mar = parts("VAR"), parts("MAR")
    labelled = TokenTransformer(dim=32, num_heads=2, num_layers=1, num_cross_layers=1, num_classes=3)
    for given, message in [
        ({**mar, "flow_head": None}, "tokens are continuous: give flow_head="),
        ({**mar, "codec": var["codec"]}, "AutoencoderKL, got a VQAutoencoder as codec"),
        ({**mar, "codec": small_kl(8)}, "4, 4 and 8 channels a token"),
        ({**mar, "flow_head": FlowHead(CHANNELS, 48, 16, 1)}, "conditions of width 48, where the transformer's is 32"),
        ({**var, "flow_head": mar["flow_head"]}, "leave it out"),
        ({**var, "codec": mar["codec"]}, "those of a AutoencoderKL a side"),
        ({**var, "codec": VQAutoencoder(16, V, CHANNELS, (8, 16), scale_sides=(1, 4))}, r"maps are \[1, 4\] a side"),
        ({**var, "codec": VQAutoencoder(16, V, 8, (8, 16), scale_sides=SIDES)}, "codes of length 4, the codec's are"),
        ({**var, "transformer": labelled}, "is told labels and not words"),
    ]:
        with pytest.raises(ValueError, match=message):
            ms.ImagePipeline(**given)
