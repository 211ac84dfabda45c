"""Linear layers with 8-bit weights: half the memory, and products in 8 bits where the device has them.

Weights have one scale per output, activations are quantised as they come with one scale per token (`kernels.fused`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..kernels.fused import Quantized, Rows, quantize_rows, quantized_linear

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LEAST = 16  # products narrower than this are left as they are: kernels cannot take them, and they weigh nothing


class QuantizedLinear(nn.Module):
    """`nn.Linear` with weights in 8 bits, for inference.

    Args:
        linear: whose weights are taken; it is not changed.
        dtype: torch.int8 or torch.float8_e4m3fn.

    The buffers hold bytes, so that `.to(dtype)` of a model that contains this layer changes neither values nor scales.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, dtype
        if linear.weight.is_meta:  # a plan of memory, of the right size
            values = torch.empty_like(linear.weight, dtype=torch.int8)
            scale = torch.empty((self.out_features, 4), dtype=torch.int8, device="meta")
        else:
            quantized = quantize_rows(linear.weight.detach().contiguous(), dtype)
            values, scale = (part.contiguous().view(torch.int8) for part in quantized[:2])
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.bias: Tensor | None
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    @property
    def quantized(self) -> Quantized:
        """The weight [out, in] and its scales [out, 1]."""
        values, scale = self.get_buffer("values"), self.get_buffer("scale")
        return Quantized(values.view(self.dtype), scale.view(torch.float32))

    @property
    def weight(self) -> Tensor:
        """The bytes of the weight: for those who ask a layer for its shape or device."""
        return self.get_buffer("values")

    def forward(self, x: Rows) -> Tensor:
        return quantized_linear(x, self.quantized, self.bias)

    def after_gelu(self, x: Tensor) -> Tensor:
        """What the layer makes of GELU(x), by its tanh approximation."""
        return quantized_linear(x, self.quantized, self.bias, gelu=True)

    @torch.no_grad()
    def add(self, delta: Tensor) -> None:
        """Add `delta` [out, in] to the weight, in place."""
        now = self.quantized
        changed = quantize_rows(now.values.float() * now.scale + delta, self.dtype)
        self.get_buffer("values").copy_(changed.values.view(torch.int8))
        self.get_buffer("scale").copy_(changed.scale.view(torch.int8))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.dtype}"


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """A linear layer that is a product with an ordinary tensor and nothing else: no adapter, no other library's."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter


def quantize_linears(
    module: nn.Module, dtype: torch.dtype, wanted: Callable[[str], bool] = lambda name: True, *, least: int = LEAST
) -> int:
    """Put a `QuantizedLinear` into the place of every `nn.Linear` of `module` whose name is `wanted` and that has
    `least` inputs and outputs or more.

    Returns:
        How many there were. Layers of other classes, such as those of adapters, stay as they are.
    """
    found = [(name, part) for name, part in module.named_modules() if is_plain(part) and wanted(name)]
    found = [(name, part) for name, part in found if min(part.in_features, part.out_features) >= max(LEAST, least)]
    for name, part in found:
        owner, _, leaf = name.rpartition(".")
        parent: Any = module.get_submodule(owner)
        if leaf.isdigit() and isinstance(parent, (nn.ModuleList, nn.Sequential)):
            parent[int(leaf)] = QuantizedLinear(part, dtype)
        else:
            setattr(parent, leaf, QuantizedLinear(part, dtype))
    return len(found)


def side_by_side(layers: Sequence[QuantizedLinear]) -> tuple[Quantized, Tensor]:
    """Weights and biases of layers with one input, in one piece of memory that the layers then share."""
    together = {name: torch.cat([layer.get_buffer(name) for layer in layers]) for name in ("values", "scale", "bias")}
    for name, whole in together.items():
        for layer, part in zip(layers, whole.split([layer.out_features for layer in layers])):
            layer._buffers[name] = part
    values, scale, bias = together.values()
    return Quantized(values.view(layers[0].dtype), scale.view(torch.float32)), bias
