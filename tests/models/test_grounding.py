"""Grounding beside the prompt: a block against its formula, gates of 0, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock

from millstream.models.grounding import Reground


@pytest.fixture
def block() -> BasicTransformerBlock:
    torch.manual_seed(0)
    made = BasicTransformerBlock(16, 2, 8, cross_attention_dim=16, attention_type="gated")
    fuser: Any = made.fuser
    fuser.alpha_attn.data += 0.7
    fuser.alpha_dense.data += 0.4
    return made.eval()


def ask(block: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text, boxes = (torch.randn(2, count, 16, generator=generator) for count in (9, 5, 3))
    given = {"encoder_hidden_states": text, "cross_attention_kwargs": {"gligen": {"objs": boxes}}}
    return block(x, **given)


@torch.no_grad()
def test_both_see_the_same_picture(block: Any) -> None:
    before = ask(block)
    rewired = Reground(block)
    generator = torch.Generator().manual_seed(1)
    x, text, boxes = (torch.randn(2, count, 16, generator=generator) for count in (9, 5, 3))
    seen = x + block.attn1(block.norm1(x))
    found = ask(block)
    rewired.undo()
    wanted = seen + block.attn2(block.norm2(seen), text) + (block.fuser(seen, boxes) - seen)
    wanted = wanted + block.ff(block.norm3(wanted))
    torch.testing.assert_close(found, wanted)
    assert (found - before).abs().max() > 1e-3
    assert torch.equal(ask(block), before), "undone"


@torch.no_grad()
def test_a_network_whose_gates_are_shut_draws_as_before() -> None:
    torch.manual_seed(0)
    network: Any = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        attention_type="gated",
    ).eval()
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    boxes = {
        "boxes": torch.rand(1, 3, 4),
        "masks": torch.ones(1, 3),
        "positive_embeddings": torch.randn(1, 3, 16),
    }
    told = {"encoder_hidden_states": text, "cross_attention_kwargs": {"gligen": boxes}}
    before = network(x, 500, **told).sample
    rewired = Reground(network)
    torch.testing.assert_close(network(x, 500, **told).sample, before)
    for module in network.modules():
        if hasattr(module, "alpha_attn"):
            module.alpha_attn.data += 1.0
    parallel = network(x, 500, **told).sample
    rewired.undo()
    assert (network(x, 500, **told).sample - parallel).abs().max() > 1e-6
    assert (parallel - before).abs().max() > 1e-6


def test_a_network_without_grounding_is_refused() -> None:
    with pytest.raises(ValueError, match="this Linear has no gated grounding"):
        Reground(torch.nn.Linear(2, 2))
