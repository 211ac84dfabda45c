"""The one causal backbone: Wan's video transformer, with the names and arguments of diffusers' `WanTransformer3DModel`.

One class serves the 14B checkpoint, the 1.3B checkpoint and the embedded world; differences are config. Attention is
bidirectional, causal under a `Window` (training, reference) or cached (streaming); the three agree where they overlap.
Shapes: B batch, F latent frames, T tokens per frame, L = F * T, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanTimeTextImageEmbedding
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from ..kernels import apply_rotary, attend, rotary_angles
from ..streaming.kv_cache import KVChunk, Window
from .packed import PackedModelMixin

# Per layer: (k, v) [B, S, H, d] of the prompt, (k, v, k, v) with an image prompt.
TextKeys = Sequence[tuple[Tensor, ...]]


class Context(NamedTuple):
    """What every block of one pass shares."""

    rotary: tuple[Tensor, Tensor]
    mask: Tensor | BlockMask | None
    cache: KVChunk | None


class Attention(nn.Module):
    """Projections and q/k norms of one attention layer; RMSNorm runs over all heads together, as in Wan."""

    def __init__(self, dim: int, heads: int, eps: float, added_kv_proj_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=eps) for _ in range(2))
        if added_kv_proj_dim is not None:
            self.add_k_proj, self.add_v_proj = (nn.Linear(added_kv_proj_dim, dim) for _ in range(2))
            self.norm_added_k = nn.RMSNorm(dim, eps=eps)

    def query(self, x: Tensor) -> Tensor:
        return self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm_k(self.to_k(x)).unflatten(-1, (self.heads, -1)), self.to_v(x).unflatten(-1, (self.heads, -1))

    def image_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = self.norm_added_k(self.add_k_proj(x)).unflatten(-1, (self.heads, -1))
        return k, self.add_v_proj(x).unflatten(-1, (self.heads, -1))

    def out(self, x: Tensor) -> Tensor:
        return self.to_out[0](x.flatten(-2))


class Block(nn.Module):
    """Self-attention, attention to the prompt, feed-forward; shift, scale and gate come from the timestep."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        heads: int,
        eps: float,
        cross: bool,
        cross_norm: bool,
        added_kv_proj_dim: int | None,
    ) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = Attention(dim, heads, eps)
        if cross:
            self.attn2 = Attention(dim, heads, eps, added_kv_proj_dim)
            self.norm2 = FP32LayerNorm(dim, eps, elementwise_affine=True) if cross_norm else nn.Identity()
        self.cross = cross
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.norm3 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, modulation: Tensor, text: tuple[Tensor, ...], layer: int, context: Context) -> Tensor:
        """`x` [B, L, D]; `modulation` [B, G, 6, D] for G equal groups of tokens; `text` keys as in `TextKeys`."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (self.scale_shift_table + modulation.float()).unbind(2)
        y = self.self_attention(modulated(self.norm1(x.float()), shift, scale).type_as(x), layer, context)
        x = gated(x.float(), y, gate).type_as(x)
        if self.cross:
            x = x + self.cross_attention(self.norm2(x.float()).type_as(x), text)
        y = self.ffn(modulated(self.norm3(x.float()), ff_shift, ff_scale).type_as(x))
        return gated(x.float(), y.float(), ff_gate).type_as(x)

    def self_attention(self, x: Tensor, layer: int, context: Context) -> Tensor:
        q, (k, v) = self.attn1.query(x), self.attn1.keys(x)
        q, k, mask = apply_rotary(q, *context.rotary), apply_rotary(k, *context.rotary), context.mask
        dtype = v.dtype
        if context.cache is not None:
            k, v, mask = context.cache.attend_view(layer, k, v)
        return self.attn1.out(attend(q.to(dtype), k.to(dtype), v.to(dtype), mask=mask))

    def cross_attention(self, x: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        q = self.attn2.query(x)
        prompts = text[0].shape[0]  # one prompt per stream, or one per frame
        grouped = q.reshape(prompts, -1, *q.shape[2:])
        prompt, *image = (
            attend(grouped, k.to(q.dtype), v.to(q.dtype)) for k, v in zip(text[::2], text[1::2], strict=True)
        )
        out = prompt + image[0] if image else prompt
        return self.attn2.out(out.reshape(q.shape))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, `x` [B, L, D] with one shift and scale [B, G, D] per group of L / G tokens."""
    if shift.shape[1] == 1:
        return torch.addcmul(shift, x, 1 + scale)
    return torch.addcmul(shift[:, :, None], x.unflatten(1, (shift.shape[1], -1)), 1 + scale[:, :, None]).flatten(1, 2)


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y gate, grouped as in `modulated`."""
    if gate.shape[1] == 1:
        return torch.addcmul(x, y, gate)
    groups = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, groups), y.unflatten(1, groups), gate[:, :, None]).flatten(1, 2)


class CausalTransformer3DModel(PackedModelMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Wan's transformer (Wan 2.1, arXiv:2503.20314), bidirectional, block-causal or cached.

    Args (up to `pos_embed_seq_len`: as in diffusers' `WanTransformer3DModel`; the rest is keyword-only):
        patch_size: latent frames, rows and columns per token.
        rope_max_seq_len: accepted for its checkpoints' sake; angles are computed, so no table ends.
        action_dim: width of a per-frame action vector, added to the timestep embedding; 0 for none.
        cross_attention_layers: which blocks attend to the prompt; all of them by default.
        position_grid: (rows, columns) of tokens that get a learned absolute position, None for rotary positions alone.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules: ClassVar = ["Block"]
    _repeated_blocks: ClassVar = ["Block"]
    _skip_layerwise_casting_patterns: ClassVar = ["patch_embedding", "condition_embedder", "norm"]
    _keep_in_fp32_modules: ClassVar = ["time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"]
    _keys_to_ignore_on_load_unexpected: ClassVar = ["norm_added_q"]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int | None = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        *,
        action_dim: int = 0,
        cross_attention_layers: Sequence[int] | None = None,
        position_grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if qk_norm != "rms_norm_across_heads":
            raise ValueError(
                f"qk_norm must be 'rms_norm_across_heads', the only kind Wan checkpoints have; got {qk_norm!r}"
            )
        dim = num_attention_heads * attention_head_dim
        cross = range(num_layers) if cross_attention_layers is None else cross_attention_layers
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.condition_embedder = WanTimeTextImageEmbedding(
            dim, freq_dim, dim * 6, text_dim, image_embed_dim=image_dim, pos_embed_seq_len=pos_embed_seq_len
        )
        self.blocks = nn.ModuleList(
            Block(dim, ffn_dim, num_attention_heads, eps, layer in cross, cross_attn_norm, added_kv_proj_dim)
            for layer in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, (out_channels or in_channels) * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        if action_dim:
            self.action_embedder = nn.Linear(action_dim, dim)
        if position_grid is not None:
            self.position_embedding = nn.Parameter(torch.randn(math.prod(position_grid), dim) * 0.02)

    def embed_text(self, encoder_hidden_states: Tensor, image: Tensor | None = None) -> TextKeys:
        """Keys and values of a prompt for every block, to be computed once and passed as `text_keys`.

        Args:
            encoder_hidden_states: [B, S, text_dim], or [B, F, S, text_dim] with one prompt per frame.
            image: [B, N, image_dim] embedding of an image prompt, for image-to-video checkpoints.
        """
        text = self.condition_embedder.text_embedder(encoder_hidden_states.flatten(0, -3))
        if image is not None:
            if self.condition_embedder.image_embedder is None:
                raise ValueError("this model takes no image prompt (its image_dim is None); leave the image out")
            image = self.condition_embedder.image_embedder(image)
        return [
            () if not block.cross else block.attn2.keys(text) + (() if image is None else block.attn2.image_keys(image))
            for block in cast("Sequence[Block]", self.blocks)
        ]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        actions: Tensor | None = None,
        text_keys: TextKeys | None = None,
        window: Window | None = None,
        cache: KVChunk | None = None,
        mask: Tensor | BlockMask | None = None,
        positions: Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the flow v = noise - x0.

        Args:
            hidden_states: [B, C, F, H, W] noisy latents.
            timestep: [B], per frame [B, F] or per token [B, L]; 1000 sigma, in [0, 1000].
            encoder_hidden_states: the prompt, as in `embed_text`; or give its `text_keys`.
            encoder_hidden_states_image: [B, N, image_dim].
            attention_kwargs: refused; diffusers' processors do not run here.
            actions: [B, F, action_dim].
            window: attend causally under this window; everything sees everything by default.
            mask: such a window's `mask` or `block_mask`, made once by the caller instead.
            cache: the open chunk of a `KVCache`: attend to the stream so far. The frames' positions come from it.
            positions: int64 [F] or [B, F], each frame's place in its stream, where that is not its place in the tensor.

        Returns:
            [B, C_out, F, H, W], wrapped unless `return_dict=False`.
        """
        if attention_kwargs:
            raise ValueError(f"attention_kwargs are not supported, got {sorted(attention_kwargs)}")
        p_t, p_h, p_w = self.config["patch_size"]
        frames, height, width = self.grid(hidden_states)
        x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        if self.config["position_grid"] is not None:
            x = (x.unflatten(1, (frames, -1)) + self.position_embedding).flatten(1, 2).type_as(x)
        if text_keys is None:
            if encoder_hidden_states is None:
                raise ValueError("the model needs a prompt: give encoder_hidden_states, or text_keys from embed_text")
            text_keys = self.embed_text(encoder_hidden_states, encoder_hidden_states_image)
        temb, modulation = self.embed_time(timestep, actions, x.dtype)
        if window is not None:
            mask = window.mask(frames, height * width, x.device)
        if positions is None:
            positions = torch.arange(frames, device=x.device) if cache is None else cache.positions
        rotary = rotary_angles(positions, height, width, self.config["attention_head_dim"])
        context = Context(rotary, mask, cache)
        for layer, block in enumerate(self.blocks):
            x = block(x, modulation, text_keys[layer], layer, context)
        shift, scale = (self.scale_shift_table + temb.float()[:, :, None]).unbind(2)
        x = self.proj_out(modulated(self.norm_out(x.float()), shift, scale).type_as(x))
        x = x.unflatten(1, (frames, height, width)).unflatten(-1, (p_t, p_h, p_w, -1))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)

    def grid(self, hidden_states: Tensor) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens."""
        patch, places = self.config["patch_size"], self.config["position_grid"]
        if hidden_states.ndim != 5 or any(n % p for n, p in zip(hidden_states.shape[2:], patch)):
            raise ValueError(
                f"latents must be [B, C, F, H, W] in whole patches of {tuple(patch)}, got {tuple(hidden_states.shape)}"
            )
        frames, height, width = (n // p for n, p in zip(hidden_states.shape[2:], patch))
        if places is not None and tuple(places) != (height, width):
            raise ValueError(f"this model draws {tuple(places)} tokens a frame, got latents for {(height, width)}")
        return frames, height, width

    def embed_time(self, timestep: Tensor, actions: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embedding [B, G, D] and modulation [B, G, 6, D]; G is 1, the frames or the tokens."""
        if (actions is None) != (self.config["action_dim"] == 0):
            seen = None if actions is None else tuple(actions.shape)
            raise ValueError(f"this model takes actions of width {self.config['action_dim']}, got {seen}")
        embedder = self.condition_embedder
        grouped = timestep if timestep.ndim == 2 else timestep[:, None]
        frequencies = embedder.timesteps_proj(grouped.flatten()).unflatten(0, grouped.shape)
        temb = embedder.time_embedder(frequencies.to(embedder.time_embedder.linear_1.weight.dtype)).to(dtype)
        if actions is not None:
            temb = temb + self.action_embedder(actions.to(dtype))
        return temb, embedder.time_proj(embedder.act_fn(temb)).unflatten(-1, (6, -1))
