"""Filling in: the mask is switched, what is known is kept, and a stream equals a slow loop over the whole."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from millstream.kernels import philox_normal
from millstream.models.transformer import CausalTransformer3DModel
from millstream.pipelines.sound_infill import Infill
from millstream.samplers import FlowSampler
from millstream.streaming.kv_cache import Window

B, C, T, TEXT, ACTION = 2, 4, 12, 6, 5
SEEDS = torch.tensor([1, 2])
WINDOW = Window(6, 0, 3)


def model() -> CausalTransformer3DModel:
    torch.manual_seed(0)
    net = CausalTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=C,
        out_channels=C,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        action_dim=ACTION,
    ).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def inputs(rows: int = B) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "text": torch.randn(rows, 3, TEXT, generator=generator),
        "actions": torch.randn(rows, T, ACTION, generator=generator),
    }


def clip(*known: slice) -> tuple[Tensor, Tensor]:
    mask = torch.zeros(B, T, dtype=torch.bool)
    for part in known:
        mask[:, part] = True
    return torch.randn(B, C, T, generator=torch.Generator().manual_seed(2)), mask


def slow_block(net: CausalTransformer3DModel, clean: Tensor, known: Tensor, first: int, last: int) -> Tensor:
    """One block by Euler's rule, from forwards over everything up to its end under the window's mask."""
    text, actions = inputs()["text"], inputs()["actions"][:, :last]
    noise = torch.stack(
        [philox_normal(SEEDS, torch.full((B,), frame), 0, (C,)) for frame in range(first, last)], dim=-1
    )
    x = torch.cat([clean[..., :first], torch.where(known[:, None, first:last], clean[..., first:last], noise)], -1)
    moving = ~known[:, :last] & (torch.arange(last) >= first)
    for sigma, after in pairwise([1.0, 0.5, 0.0]):
        levels = torch.where(moving, 1000 * sigma, 0.0)
        out = net(x[..., None, None], levels, text, return_dict=False, actions=actions, window=WINDOW)[0][..., 0, 0]
        x = x + (after - sigma) * out * moving[:, None]
    return x[..., first:]


@torch.no_grad()
def test_a_voice_goes_on_from_its_prompt_as_a_slow_loop_would_have_it() -> None:
    net, (latents, known) = model(), clip(slice(0, 4))  # the prompt ends inside a block
    fill = Infill(net, FlowSampler(2), **inputs())
    drawn = list(fill.blocks(latents, known, SEEDS, WINDOW))
    assert [part.shape[2] for part in drawn] == [3, 3, 3, 3]
    made = torch.cat(drawn, dim=2)
    clean = latents.clone()
    for first in range(0, T, 3):
        last = min(first + 3, T)
        clean[..., first:last] = slow_block(net, clean, known, first, last)
    torch.testing.assert_close(made, clean, atol=1e-5, rtol=1e-5)
    assert torch.equal(made[..., :4], latents[..., :4])
    short = list(fill.blocks(latents[..., :11], known[:, :11], SEEDS, WINDOW))
    assert [part.shape[2] for part in short] == [3, 3, 3, 2]
    assert all(torch.equal(a, b) for a, b in zip(short[:3], drawn))
    other = torch.cat(list(fill.blocks(latents + known[:, None], known, SEEDS, WINDOW)), dim=2)
    assert not torch.allclose(made[..., 4:], other[..., 4:]), "the prompt was not looked at"


@pytest.mark.parametrize("rule", ["euler", "renoise"])
@torch.no_grad()
def test_the_mask_says_whether_a_gap_fits_what_follows(rule: str) -> None:
    latents, known = clip(slice(0, 3), slice(9, T))
    later = latents.clone()
    later[..., 9:] += 1
    fill = Infill(model(), FlowSampler(2, rule=rule), **inputs())  # type: ignore[arg-type]
    whole, changed = fill.whole(latents, known, SEEDS), fill.whole(later, known, SEEDS)
    assert torch.equal(whole[:, :, known[0]], latents[:, :, known[0]])
    assert not torch.allclose(whole[..., 3:9], changed[..., 3:9])
    stream, same = (torch.cat(list(fill.blocks(given, known, SEEDS, WINDOW)), 2) for given in (latents, later))
    assert torch.equal(stream[..., :9], same[..., :9])
    assert not torch.allclose(stream[..., 3:9], whole[..., 3:9])


@torch.no_grad()
def test_a_window_that_holds_all_is_the_whole() -> None:
    """With one block the past is everything, so both masks are the same."""
    fill = Infill(model(), FlowSampler(2), **inputs())
    latents, known = clip(slice(2, 5))
    (block,) = fill.blocks(latents, known, SEEDS, Window(T, 0, T))
    torch.testing.assert_close(block, fill.whole(latents, known, SEEDS), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_guidance_goes_beyond_what_is_wanted() -> None:
    net, (latents, known) = model(), clip(slice(0, 3))
    wanted = inputs()
    pair: dict[str, Any] = {name: torch.cat([part, torch.zeros_like(part)]) for name, part in wanted.items()}
    plain = Infill(net, FlowSampler(1), **wanted)
    nothing: dict[str, Any] = {name: torch.zeros_like(part) for name, part in wanted.items()}
    empty = Infill(net, FlowSampler(1), **nothing)
    guided = Infill(net, FlowSampler(1), **pair, guidance_scale=2.5)
    a, b = (fill.whole(latents, known, SEEDS) for fill in (plain, empty))
    expected = torch.where(known[:, None], latents, b + 2.5 * (a - b))
    torch.testing.assert_close(guided.whole(latents, known, SEEDS), expected, atol=1e-5, rtol=1e-5)
    streamed = torch.cat(list(guided.blocks(latents, known, SEEDS, Window(T, 0, T))), 2)
    torch.testing.assert_close(streamed, expected, atol=1e-5, rtol=1e-5)


def test_a_model_of_pictures_is_refused() -> None:
    net = CausalTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, text_dim=4, freq_dim=8, ffn_dim=8, num_layers=1
    )
    with pytest.raises(ValueError, match=r"patch_size \(1, 1, 1\) and out_channels as in_channels, got \(1, 2, 2\)"):
        Infill(net, FlowSampler(2))
