"""The per-token flow network: starts at nothing, learns a conditional distribution, treats tokens apart."""

from __future__ import annotations

from itertools import pairwise

import torch

from millstream.models.flow_head import FlowHead
from millstream.samplers import Euler, FlowSchedule


def test_it_starts_at_zero_and_treats_tokens_apart() -> None:
    head = FlowHead(channels=3, condition_dim=5, dim=16, layers=2)
    x, condition = torch.randn(4, 3), torch.randn(4, 5)
    assert head(x, 0.5, condition).abs().max() == 0
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    both = head(x, torch.tensor([0.1, 0.2, 0.3, 0.4]), condition)
    torch.testing.assert_close(both[2:3], head(x[2:3], 0.3, condition[2:3]))


def test_it_learns_tokens_from_their_conditions() -> None:
    torch.manual_seed(0)
    head = FlowHead(channels=2, condition_dim=1, dim=32, layers=2)
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(300):
        condition = torch.randint(2, (128, 1)).float() * 2 - 1
        head.loss(torch.cat([condition, -condition], dim=1), condition).backward()
        optimizer.step()
        optimizer.zero_grad()
    condition = torch.tensor([[-1.0], [1.0]]).repeat(32, 1)
    x = torch.randn(64, 2)
    with torch.no_grad():
        for sigma, sigma_next in pairwise(FlowSchedule().sigmas(10)):
            x, _ = Euler().step(x, head(x, sigma, condition), sigma, sigma_next)
    assert (x - torch.cat([condition, -condition], dim=1)).abs().mean() < 0.2
