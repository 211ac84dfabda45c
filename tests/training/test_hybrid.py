"""A world with linear layers is trained by the recipe of any other."""

from __future__ import annotations

import pytest
import torch

from millstream.models.transformer import CausalTransformer3DModel
from millstream.training.world import WINDOW, flow_loss, predict_flow


def hybrid(mixer: str) -> CausalTransformer3DModel:
    torch.manual_seed(0)
    return CausalTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=40,
        num_layers=2,
        action_dim=3,
        cross_attention_layers=[0],
        position_grid=(2, 3),
        mixer=mixer,
    )


def batch(frames=6):
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(2, 4, frames, 4, 6, generator=generator)
    actions = torch.randn(2, frames, 3, generator=generator)
    tokens = torch.randn(4, 5, 16, generator=generator)
    return clean, actions, tokens, torch.zeros(2, frames, dtype=torch.bool), WINDOW.mask(frames, 6)


@pytest.mark.parametrize("mixer", ["hybrid(sana, every=2)", "linear(gated)", "linear(lina)"])
def test_what_is_trained_is_what_is_streamed(mixer):
    transformer, (clean, actions, tokens, after, mask) = hybrid(mixer), batch()
    sigma = torch.rand(2, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        seen = predict_flow(transformer, clean, sigma, actions, tokens, after, mask)
        expected = transformer(clean, sigma * 1000, tokens[::2], actions=actions, window=WINDOW).sample
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)


def test_it_learns():
    transformer, given = hybrid("hybrid(lightning, every=2)"), batch()
    optimizer = torch.optim.Adam(transformer.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        torch.manual_seed(3)  # the same noise each time: a loss that must fall if gradients are right
        loss = flow_loss(transformer, *given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_frames_out_of_order_are_refused():
    transformer, (clean, actions, tokens, after, mask) = hybrid("linear(sana)"), batch()
    with pytest.raises(ValueError, match="linear layers cannot read a mask"):
        predict_flow(transformer, clean, torch.ones(2, 6), actions, tokens, after, mask, torch.arange(6))
