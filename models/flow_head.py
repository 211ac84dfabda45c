"""The per-token network of continuous tokens: carries noise to a token under that token's condition."""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from .packed import PackedModelMixin


class FlowHead(PackedModelMixin, ModelMixin, ConfigMixin):
    """Residual blocks modulated by noise level and condition; each token on its own.

    Source: diffusion loss, MAR (arXiv:2406.11838), section 3.2, with v = noise - token in the place of noise.

    Args:
        channels: of a token.
        condition_dim: of what the token transformer says about it.
        dim, layers: of the blocks.
    """

    @register_to_config
    def __init__(self, channels: int = 16, condition_dim: int = 192, dim: int = 256, layers: int = 3) -> None:
        super().__init__()
        self.level = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.condition, self.input = nn.Linear(condition_dim, dim), nn.Linear(channels, dim)
        self.modulations = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(layers))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim)) for _ in range(layers)
        )
        self.last_modulation, self.output = nn.Linear(dim, 2 * dim), nn.Linear(dim, channels)
        for part in (self.modulations, self.last_modulation, self.output):
            for parameter in part.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, sigma: Tensor | float, condition: Tensor) -> Tensor:
        """Velocity [M, C] at x [M, C], at the level `sigma` [M] or one for all, under conditions [M, condition_dim]."""
        if not isinstance(sigma, Tensor):  # filled on the device: a copy from the host cannot be recorded in a graph
            sigma = torch.full((x.shape[0],), sigma, device=x.device)
        sigma = sigma.to(x.device, torch.float32).expand(x.shape[0])
        given = F.silu(self.level(frequencies(sigma, self.config["dim"]).to(x.dtype)) + self.condition(condition))
        x = self.input(x)
        for modulation, layer in zip(self.modulations, self.blocks):
            shift, scale, gate = modulation(given).chunk(3, dim=-1)
            x = x + gate * layer(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)
        shift, scale = self.last_modulation(given).chunk(2, dim=-1)
        return self.output(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)

    def loss(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Flow matching at random levels, the mean over tokens [M, C]."""
        sigma, noise = torch.rand(tokens.shape[0], device=tokens.device), torch.randn_like(tokens)
        level = sigma[:, None]
        velocity = self((1 - level) * tokens + level * noise, sigma, condition)
        return (velocity.float() - (noise - tokens)).square().mean()


def frequencies(sigma: Tensor, dim: int) -> Tensor:
    """Sines and cosines [M, dim] of noise levels [M]."""
    scales = torch.exp(torch.arange(0, dim, 2, device=sigma.device) * (-math.log(1000.0) / dim))
    angles = 100 * sigma[:, None] * scales
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
