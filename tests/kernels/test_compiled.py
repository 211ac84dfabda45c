"""Every Triton kernel compiles to machine code for an A100 and an H100, on a machine without either.

The interpreter runs kernels as Python, which takes what the compiler refuses. Nothing is launched here: kernels are
compiled for arguments as their callers give them, and must fit into shared memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

COMPILING = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

capability = int(sys.argv[1])
processors, shared = {80: (108, 166912), 90: (132, 232448)}[capability]


class NoGPU:
    def get_current_target(self):
        return GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(NoGPU())
run, compiled = jit.JITFunction.run, set()


def compile_only(self, *arguments, grid, warmup, **options):
    kernel = run(self, *arguments, grid=grid, warmup=True, **options)
    assert len(kernel.asm["cubin"]) > 1000, self.fn.__name__
    assert kernel.metadata.shared <= shared, (self.fn.__name__, kernel.metadata.shared)
    compiled.add(self.fn.__name__)
    return kernel


jit.JITFunction.run = compile_only
half = lambda *shape, dtype=torch.bfloat16: torch.zeros(shape, dtype=dtype)
one = lambda *shape: torch.zeros(shape)
"""

FUSED = """
from millstream.kernels.fused import triton as fused, triton_join, triton_linear as linear

x, shift, weight = half(1, 64, 1536), one(1, 3, 1536), half(1536)
eight_bits = [torch.int8] + [torch.float8_e4m3fn] * (capability >= 89)
cos = one(64, 64)
for dtype in (torch.bfloat16, *eight_bits[1:]):
    fused.norm_rotary_triton(x, weight, cos, cos, 12, 1e-6, None, dtype)
fused.norm_rotary_triton(x, weight, cos, cos, 12, 1e-6, torch.arange(64), torch.bfloat16)
fused.norm_rotary_triton(half(2, 64, 1024), half(64), one(64, 32), one(64, 32), 16, 1e-6, None, torch.bfloat16)
fused.gate_residual_triton(x, x, shift)
fused.gated_silu_triton(half(2, 64, 5504))
for dtype in (None, *eight_bits):
    fused.norm_modulate_triton(x, shift, shift, None, None, 1e-6, dtype)
    triton_join.gate_norm_triton(x, x, shift, shift, shift, None, None, 1e-6, dtype)
    triton_join.gate_norm_triton(x, x, None, None, None, weight, weight, 1e-6, dtype)
for dtype in eight_bits:
    for width, gelu in ((1536, False), (8960, True)):
        fused.quantize_rows_triton(half(4, width), dtype, gelu)
    for tiles in (linear.CANDIDATES if capability == 90 and dtype == torch.int8 else (linear.Tiles(128, 128, 128),)):
        values, columns = half(512, 1536, dtype=dtype), half(1024, 1536, dtype=dtype)
        linear.quantized_product_triton(values, one(512, 1), columns, one(1024, 1), half(1024), torch.bfloat16, tiles)
"""

ATTENTION = """
from millstream.kernels import BlockPlan, planners
from millstream.kernels.attention import launch, merge_triton, quantize, quantize_triton, sparse, summary_triton
from millstream.kernels.attention.backward import attend_blocks_backward

dense = lambda block: BlockPlan.dense(256, 512, block)
q, k = half(1, 256, 2, 128), half(1, 512, 2, 128)
scale, float8 = 128**-0.5, torch.float8_e4m3fn
launch.INTERPRETED = capability // 10, processors, shared


def attend(q, k, v, plan, *more):
    launch.attend_blocks(*sparse.operands(q, k, v, plan, None, scale, *more))


for block in ((64, 64), (128, 128)):
    attend(q, k, k, dense(block))
windows = planners.window((4, 8, 8), (2, 4, 4))
attend(q, half(1, 256, 2, 128), half(1, 256, 2, 128), windows)
eight = quantize.Quantized(*(half(*x.shape, dtype=torch.int8) for x in (q, k)), k, one(1, 2, 2), one(1, 2, 4), None, k)
attend(eight.q, eight.k, k, dense((128, 128)), eight, torch.bfloat16)
out, lse = half(2, 1, 256, 2, 128, dtype=torch.float32), one(2, 1, 2, 256)
merge_triton.merge_stacked(out, lse, torch.bfloat16)
merge_triton.merge_pair(q, lse[0], q, lse[1])
plan = dense((64, 64))
lists = plan.indices.contiguous(), plan.n_full.contiguous(), plan.n_masked.contiguous()
attend_blocks_backward(q, k, k, q, lse[0], q, None, *lists, *[None] * 6, scale, 64, 64, -(2**31 - 2), 0)
summary_triton.summarise_triton(k, k, 64, True)
for how in ("int8", "fp8") if capability >= 89 else ("int8",):
    quantize_triton.quantize_tiles_triton(q, 64, how, None)
    quantize_triton.quantize_tiles_triton(q, 64, how, one(1, 2, 128))
if capability >= 89:
    turned = half(1, 2, 128, 512, dtype=float8)
    for channels in (None, one(1, 2, 128)):
        quantize_triton.turn_triton(k, turned, 8, channels)
if capability == 90:
    attend(q.to(float8), k.to(float8), turned, dense((64, 128)), None, torch.bfloat16)
"""

OTHERS = """
from millstream.kernels.linear_attention.triton import linear_attention_triton
from millstream.kernels.noise.triton import philox_triton
from millstream.kernels.norm_silu.triton import norm_silu_triton

q, v, state = half(1, 256, 2, 64), half(1, 256, 2, 64), one(1, 2, 64, 64)
for block in (1, 64):
    for g in (None, one(1, 256 if block == 1 else 4, 2, 1), one(1, 256 if block == 1 else 4, 2, 64)):
        linear_attention_triton(q, q, v, g, state, block, torch.bfloat16)
philox_triton(torch.tensor([3]), torch.tensor([5]), 0, 4096, bits=None)
x = half(1, 96, 4, 8, 8).contiguous(memory_format=torch.channels_last_3d)
norm_silu_triton(x, half(96), torch.empty_like(x))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("script", "kernels"),
    [
        (FUSED, "_norm_rotary _norm_modulate _gate_residual _gated_silu _gate_norm _quantize _linear"),
        (ATTENTION, "attend backward merge merge_pair _summary _quantize"),
        (OTHERS, "_sum _scan _read channel chunk _philox _norm_silu"),
    ],
    ids=["fused", "attention", "others"],
)
def test_kernels_compile_without_a_gpu(script, kernels, capability, tmp_path):
    wanted = {f"{name}_kernel" for name in kernels.split()}
    wanted |= {"_turn_kernel"} if capability == 90 and script is ATTENTION else set()
    script = f"{COMPILING}{script}\nassert compiled >= {wanted!r}, compiled\nprint(len(compiled))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", script, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
