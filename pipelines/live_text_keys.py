"""A UNet's attention to a prompt, with the prompt's keys and values computed once per prompt instead of once per step.

All layers' keys and values lie side by side in one tensor [B, S, D]. It is handed to the network in the place of the
text, and each layer's processor takes its own share of it. Text itself, which is narrower, is still understood, so the
pipeline that the network belongs to goes on working.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F


class TextKeys:
    """Puts processors into a UNet.

    Args:
        unet: whose attention is PyTorch's own; others are left alone (`of` gives None).
    """

    def __init__(self, unet: Any) -> None:
        self._layers = [layer for name, layer in unet.named_modules() if name.endswith(".attn2")]
        self.width = 2 * sum(layer.inner_kv_dim for layer in self._layers)
        start = 0
        for layer in self._layers:
            layer.set_processor(KeptKeys(start, self.width))
            start += 2 * layer.inner_kv_dim

    @classmethod
    def of(cls, unet: Any) -> TextKeys | None:
        """For a UNet whose cross-attention can be split so, else None."""
        layers = [layer for name, layer in unet.named_modules() if name.endswith(".attn2")]
        plain = all(
            type(layer.processor) in (AttnProcessor, AttnProcessor2_0, KeptKeys)
            and layer.norm_k is None
            and layer.norm_cross is None
            and layer.group_norm is None
            for layer in layers
        )
        return cls(unet) if layers and plain and unet.encoder_hid_proj is None else None

    def read(self, text: Tensor) -> Tensor:
        """Text [B, S, D] as the keys and values of all layers [B, S, width]."""
        return torch.cat([part(text) for layer in self._layers for part in (layer.to_k, layer.to_v)], dim=-1)


class KeptKeys:
    """Attention to one layer's share of the kept keys and values."""

    def __init__(self, start: int, width: int) -> None:
        self.start, self.width = start, width

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states.shape[-1] != self.width or attention_mask is not None:
            return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        wide = attn.inner_kv_dim
        key, value = encoder_hidden_states[..., self.start : self.start + 2 * wide].split(wide, dim=-1)
        # [B, L, H D] -> [B, H, L, D]
        query, key, value = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (attn.to_q(hidden_states), key, value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        out = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
        return (out + hidden_states if attn.residual_connection else out) / attn.rescale_output_factor
