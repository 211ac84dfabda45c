"""The kernel that summarises keys and values against the plain formula; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from millstream.kernels.attention import KVSummary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(("tokens", "block"), [(300, 64), (256, 128), (40, 64), (500, 192)])
def test_one_pass_summarises_as_the_formula_does(tokens, block, first_order, monkeypatch):
    from millstream.kernels.attention import summary_triton

    monkeypatch.setattr(summary_triton, "PROGRAMS", 8)  # so that a program walks more than one block
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn((2, tokens, 2, 3, 32), generator=generator).to(DEVICE) + 1.0
    k, v = joint[:, :, 0], joint[:, :, 1]
    key, value, slope = summary_triton.summarise_triton(k, v, block, first_order)
    truth = KVSummary.of(k.double().cpu(), v.double().cpu(), block, first_order=first_order)
    torch.testing.assert_close(key.double().cpu(), truth.key, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(value.double().cpu(), truth.value, atol=1e-6, rtol=1e-5)
    assert (slope is not None) == (truth.slope is not None) == first_order
    if slope is not None:
        torch.testing.assert_close(slope.double().cpu(), truth.slope, atol=2e-5, rtol=1e-4)
