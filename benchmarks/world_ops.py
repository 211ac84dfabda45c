"""Attention and decoder of the shipped world by backend and layout, in CUDA graphs; run by `world.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import millstream as ms


def attention(device: torch.device) -> dict[str, Any]:
    """Microseconds of one layer's attention (48 queries, 768 keys, 4 heads of 64), by backend, in a graph of 20."""
    report = {}
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 4):
            q = torch.randn(rows, 48, 4, 64, device=device, dtype=dtype).transpose(1, 2)
            k, v = (torch.randn(rows, 768, 4, 64, device=device, dtype=dtype).transpose(1, 2) for _ in range(2))
            for backend in ("EFFICIENT_ATTENTION", "MATH", "FLASH_ATTENTION", "CUDNN_ATTENTION"):
                name = f"{str(dtype)[6:]} x {rows} {backend.lower()}"
                try:
                    with sdpa_kernel(getattr(SDPBackend, backend)):
                        report[name] = graphed(partial(scaled_dot_product_attention, q, k, v))
                except RuntimeError as error:
                    report[name] = str(error).splitlines()[0][:80]
    return report


@torch.no_grad()
def decoder(device: torch.device) -> dict[str, Any]:
    """Microseconds to decode, in a graph of 20, by layout of weights and pictures."""
    report = {}
    for dtype in (torch.float32, torch.bfloat16):
        codec = ms.WorldPipeline.from_pretrained("freedoom", torch_dtype=dtype).to(device).codec
        for rows in (1, 4):
            for layout in (torch.contiguous_format, torch.channels_last):
                codec.decoder.to(memory_format=layout)
                latents = torch.randn(rows, codec.config["latent_channels"], 12, 16, device=device, dtype=dtype)
                latents = latents.contiguous(memory_format=layout)
                report[f"{str(dtype)[6:]} x {rows} {str(layout)[6:]}"] = graphed(partial(codec.decoder, latents))
    return report


def graphed(call: Callable[[], Any], calls: int = 20) -> float:
    """Microseconds per call."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    return statistics.median(times)
