"""Pictures as bytes on the host."""

from __future__ import annotations

import pytest
import torch

from millstream.streaming.pixels import as_bytes, on_host

VALUES = torch.tensor([[-0.5, 0.0, 0.001], [0.5, 1.0, 1.5]])


def test_bytes_are_rounded_and_kept_in_range_and_the_pictures_stay():
    pictures = VALUES.clone()
    assert as_bytes(pictures).tolist() == [[0, 0, 0], [128, 255, 255]]
    assert as_bytes(pictures.bfloat16()).dtype == torch.uint8
    assert torch.equal(pictures, VALUES)


def test_what_is_on_the_host_is_given_in_order():
    assert on_host(VALUES.t()).is_contiguous()
    assert torch.equal(on_host(VALUES.t()), VALUES.t())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_and_its_next_call_leaves_it_alone():
    first = on_host(as_bytes(VALUES.cuda()))
    second = on_host(as_bytes(VALUES.flip(0).cuda()))
    assert not first.is_cuda
    assert torch.equal(first, as_bytes(VALUES))
    assert torch.equal(second, as_bytes(VALUES.flip(0)))
