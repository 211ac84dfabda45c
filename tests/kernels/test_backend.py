"""Where Triton kernels run, and what is said where they do not."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from millstream.kernels import backend


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA tensor, as far as anyone asks, on a GPU of compute capability 8.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(backend, "_installed", lambda: True)
    backend._is_new_enough.cache_clear()
    yield SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    backend._is_new_enough.cache_clear()


def test_a_cpu_tensor_is_no_work_for_triton():
    assert not backend.runs_triton(torch.ones(1))


@pytest.mark.skipif(torch.version.hip is not None, reason="AMD numbers its GPUs differently")
def test_an_older_gpu_is_told_why_once(cuda):
    with pytest.warns(UserWarning, match=r"the fast one needs compute capability 8.9 or newer, got 8.0; using PyTorch"):
        assert not backend.runs_triton(cuda, what="the fast one", capability=(8, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not backend.runs_triton(cuda, what="the fast one", capability=(8, 9))
        assert backend.runs_triton(cuda, what="another", capability=(8, 0))
        assert backend.runs_triton(cuda)
