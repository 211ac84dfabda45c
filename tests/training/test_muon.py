"""The batched Muon takes the steps that torch's own takes."""

from __future__ import annotations

import pytest
import torch

from millstream.training.muon import Muon, orthogonalised


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9 or newer, to compare with")
def test_steps_are_those_of_torch() -> None:
    shapes = [(16, 16), (16, 16), (48, 16), (16, 48), (48, 16)]
    first = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in first] for _ in range(2))
    grads = torch.Generator().manual_seed(0)
    optimizers = (
        Muon(ours, 0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        for mine, other in zip(ours, theirs):
            mine.grad = torch.randn(mine.shape, generator=grads)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, start in zip(ours, theirs, first):
        moved = (other - start).norm()
        assert moved > 0.1
        assert (mine - other).norm() < 0.02 * moved, "only bfloat16 lies between them"


def test_singular_values_come_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 40, 16), (2, 16, 40)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=generator)).float())
        assert values.min() > 0.3
        assert values.max() < 1.4


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match="for matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
