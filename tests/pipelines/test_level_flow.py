"""Steps that remember earlier steps: what is carried equals one pass over the whole trajectory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from millstream.models.transformer import CausalTransformer3DModel
from millstream.pipelines.level_flow import level_loss, level_sequence, level_steps
from millstream.streaming.kv_cache import Window

SIGMAS = (1.0, 0.8, 0.55, 0.3, 0.1, 0.0)


def model(mixer: str) -> CausalTransformer3DModel:
    torch.manual_seed(0)
    made = CausalTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=40,
        num_layers=3,
        cross_attention_layers=(1,),
        position_grid=(2, 3),
        mixer=mixer,
    )
    for parameter in made.parameters():  # gates of 0 would hide what is remembered
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made.eval()


def given() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 4, 6, generator=generator), torch.randn(2, 5, 16, generator=generator)


@pytest.mark.parametrize("mixer", ["linear(gated)", "hybrid(gated, every=3)"])
@torch.no_grad()
def test_steps_equal_one_pass_over_the_trajectory(mixer: str) -> None:
    transformer, (noise, text) = model(mixer), given()
    drawn = list(level_steps(transformer, noise, text, SIGMAS, remembered=len(SIGMAS)))
    trajectory = torch.stack([noise, *drawn[:-1]], dim=2)  # what each step was given
    levels = 1000 * torch.tensor(SIGMAS[:-1]).expand(2, -1)
    velocity = transformer(trajectory, levels, text, window=Window(len(SIGMAS))).sample
    widths = -torch.tensor(SIGMAS).diff()
    wanted = trajectory - velocity * widths[None, None, :, None, None]
    torch.testing.assert_close(torch.stack(drawn, dim=2), wanted, atol=1e-4, rtol=1e-4)
    alone = next(level_steps(transformer, drawn[2], text, SIGMAS[3:]))
    assert (alone - drawn[3]).abs().max() > 1e-4, "a step that remembers nothing draws something else"


def test_sequences_are_ordered_and_their_targets_lead_to_the_data() -> None:
    latents = torch.randn(3, 4, 5, 2, 2)
    sequence, sigmas, velocity = level_sequence(latents, torch.Generator().manual_seed(0))
    assert (sigmas.diff(dim=1) <= 0).all()
    assert ((sigmas >= 0) & (sigmas <= 1)).all()
    torch.testing.assert_close(sequence - sigmas[:, None, :, None, None] * velocity, latents)


def test_it_learns() -> None:
    transformer, (_, text) = model("linear(gated)").train(), given()
    latents = torch.randn(2, 4, 1, 4, 6).expand(-1, -1, 4, -1, -1)
    optimizer, losses = torch.optim.AdamW(transformer.parameters(), 3e-3), []
    for step in range(30):
        loss = level_loss(transformer, latents, text, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_levels_that_do_not_fall_are_refused() -> None:
    transformer, (noise, text) = model("linear(gated)"), given()
    with pytest.raises(ValueError, match=r"sigmas must fall, .* got \[0.5, 0.5, 0.0\]"):
        next(level_steps(transformer, noise, text, [0.5, 0.5, 0.0]))
