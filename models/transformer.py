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
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanTimeTextImageEmbedding
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from ..kernels import rotary_angles
from ..streaming.kv_cache import KVChunk, Window
from .actions import ActionModule, Inputs
from .attention_plans import PlannedMixin
from .block import Block, Context, Six
from .mixers import make_mixers
from .modulation import modulated
from .packed import PackedModelMixin

# Per layer: (k, v) [B, S, H, d] of the prompt, (k, v, k, v) with an image prompt.
TextKeys = Sequence[tuple[Tensor, ...]]


class Condition(NamedTuple):
    """What one timestep and one set of actions make of a pass, from `CausalTransformer3DModel.conditions`.

    `head` are shift and scale of the last norm [B, G, D], `blocks` each block's shifts, scales and gates; or None for
    long sequences, where those of all blocks at once would fill the memory: then they are made from `modulation`
    [B, G, 6, D] in turn.
    """

    modulation: Tensor
    head: tuple[Tensor, Tensor]
    blocks: list[Six] | None = None

    def six(self, layer: int, block: Block) -> Six:
        return block.six(self.modulation) if self.blocks is None else self.blocks[layer]


class CausalTransformer3DModel(PlannedMixin, PackedModelMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Wan's transformer (Wan 2.1, arXiv:2503.20314), bidirectional, block-causal or cached.

    Args (up to `pos_embed_seq_len`: as in diffusers' `WanTransformer3DModel`; the rest is keyword-only):
        patch_size: latent frames, rows and columns per token.
        rope_max_seq_len: accepted for its checkpoints' sake; angles are computed, so no table ends.
        action_dim: width of a per-frame action vector, added to the timestep embedding; 0 for none.
        cross_attention_layers: which blocks attend to the prompt; all of them by default.
        position_grid: (rows, columns) of tokens that get a learned absolute position, None for rotary positions alone.
        mixer: which layers attend linearly, and how: "softmax", "linear(sana)", "hybrid(sana, every=4)", or a name per
            layer; see `mixers`. Streams of a model with linear layers need `mixers.make_cache`.
        attention: the planner of softmax layers, "window(3, 24, 24)" (see `attention_plans`); None: everything is seen.
        action_modules: `blocks` that hear keys and mouse, and the arguments of their `actions.ActionModule`.
    `text_dim` may be None: then the prompt is a picture's embedding alone, with the keys that others have for words.
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
        text_dim: int | None = 4096,
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
        mixer: str | Sequence[str] = "softmax",
        attention: str | None = None,
        action_modules: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.set_attention(attention)
        if qk_norm != "rms_norm_across_heads":
            raise ValueError(
                f"qk_norm must be 'rms_norm_across_heads', the only kind Wan checkpoints have; got {qk_norm!r}"
            )
        dim = num_attention_heads * attention_head_dim
        cross = range(num_layers) if cross_attention_layers is None else cross_attention_layers
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.condition_embedder = WanTimeTextImageEmbedding(
            dim, freq_dim, dim * 6, text_dim or 1, image_embed_dim=image_dim, pos_embed_seq_len=pos_embed_seq_len
        )
        if text_dim is None:
            del self.condition_embedder.text_embedder
        modules = dict(action_modules or {})
        acting = modules.pop("blocks", ())
        tokens = None if position_grid is None else math.prod(position_grid)
        mixers = make_mixers(mixer, num_layers, dim=dim, heads=num_attention_heads, tokens=tokens)
        self.blocks = nn.ModuleList(
            Block(
                *(dim, ffn_dim, num_attention_heads, eps, layer in cross, cross_attn_norm, added_kv_proj_dim, part),
                ActionModule(dim, **modules) if layer in acting else None,
            )
            for layer, part in enumerate(mixers)
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
            encoder_hidden_states: [B, S, text_dim], or [B, F, S, text_dim] with one prompt per frame; [B, N, image_dim]
                where the prompt is a picture alone.
            image: [B, N, image_dim] embedding of an image prompt, for image-to-video checkpoints.
        """
        if self.config["text_dim"] is None:
            assert self.condition_embedder.image_embedder is not None, "the config asked for one"
            seen = self.condition_embedder.image_embedder(encoder_hidden_states)
            return [block.attn2.keys(seen) if block.cross else () for block in cast("Sequence[Block]", self.blocks)]
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
        timestep: Tensor | Condition,
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
        inputs: Inputs | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the flow v = noise - x0.

        Args:
            hidden_states: [B, C, F, H, W] noisy latents.
            timestep: [B], per frame [B, F] or per token [B, L]; 1000 sigma, in [0, 1000]. Or one of `conditions`, which
                holds the actions too.
            encoder_hidden_states: the prompt, as in `embed_text`; or give its `text_keys`.
            encoder_hidden_states_image: [B, N, image_dim].
            attention_kwargs: refused; diffusers' processors do not run here.
            actions: [B, F, action_dim].
            window: attend causally under this window; everything sees everything by default.
            mask: such a window's `mask` or `block_mask`, made once by the caller. Linear layers need the window too.
            cache: the open chunk of a `KVCache`: attend to the stream so far. The frames' positions come from it.
            positions: int64 [F] or [B, F], each frame's place in its stream, where that is not its place in the tensor.
            inputs: keys and mouse for the `action_modules`.

        Returns:
            [B, C_out, F, H, W], wrapped unless `return_dict=False`.
        """
        if attention_kwargs:
            raise ValueError(f"attention_kwargs are not supported, got {sorted(attention_kwargs)}")
        if text_keys is None:
            if encoder_hidden_states is None:
                raise ValueError("the model needs a prompt: give encoder_hidden_states, or text_keys from embed_text")
            text_keys = self.embed_text(encoder_hidden_states, encoder_hidden_states_image)
        frames, height, width = self.grid(hidden_states)
        x = self.embed(hidden_states)
        condition = timestep if isinstance(timestep, Condition) else self._condition(timestep, actions, x.dtype)
        linear = sum(block.mixer is not None for block in cast("Sequence[Block]", self.blocks))
        plan = self.planner((frames, height, width), window, cache, mask)
        if plan is None and window is not None and mask is None and linear < len(self.blocks):
            mask = window.mask(frames, height * width, x.device)
        elif mask is not None and window is None and linear:
            raise ValueError("linear layers cannot read a mask; give the window it was made from as well")
        block_frames = frames if window is None else window.block
        context = self._context((frames, height, width), mask, cache, block_frames, plan, positions, inputs)
        if inputs is not None and window is not None:
            context = context._replace(frame_mask=window.mask(frames, 1, x.device)[None, None])
        for layer, block in enumerate(cast("Sequence[Block]", self.blocks)):
            x = block(x, condition.six(layer, block), text_keys[layer], layer, context)
        x = self.proj_out(modulated(self.norm_out, x, *condition.head))
        x = x.unflatten(1, (frames, height, width)).unflatten(-1, (*self.config["patch_size"], -1))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)

    def remember(
        self, hidden_states: Tensor, timestep: Tensor | Condition, *, text_keys: TextKeys, cache: KVChunk, **given: Any
    ) -> None:
        """A pass for the sake of what it writes into `cache`: `forward` as far as the keys of the last block.

        Args: as in `forward`; `given` are its `actions`, `positions` and `inputs`.
        """
        x = self.embed(hidden_states)
        if not isinstance(timestep, Condition):
            timestep = self._condition(timestep, given.get("actions"), x.dtype)
        grid, last = self.grid(hidden_states), len(self.blocks) - 1
        plan = self.planner(grid, None, cache, None)
        context = self._context(grid, None, cache, grid[0], plan, given.get("positions"), given.get("inputs"))
        for layer, block in enumerate(cast("Sequence[Block]", self.blocks)):
            if layer == last and block.action_model is None:
                block.write_keys(x, timestep.six(layer, block), layer, context)
            else:
                x = block(x, timestep.six(layer, block), text_keys[layer], layer, context)

    def conditions(self, timesteps: Sequence[float], actions: Tensor | None) -> list[Condition]:
        """One `Condition` per timestep, computed together: all that a sampler's steps over one frame need.

        Args:
            timesteps: N of them, each in [0, 1000] and for all rows and frames.
            actions: [B, F, action_dim].
        """
        dtype = self.proj_out.weight.dtype
        levels = torch.stack([torch.full((1, 1), level, device=self.proj_out.weight.device) for level in timesteps])
        embedded, modulation = self.embed_time(levels, None if actions is None else actions[None], dtype)
        tables = torch.cat([block.scale_shift_table for block in cast("Sequence[Block]", self.blocks)])
        # [N, layers, B, G, 6, D] and [N, B, G, 2, D]
        blocks = modulation.float().unsqueeze(1) + tables[:, None, None]
        heads = self.scale_shift_table + embedded.float().unsqueeze(-2)
        return [
            Condition(given, (head[:, :, 0], head[:, :, 1]), [cast("Six", layer.unbind(2)) for layer in step.unbind()])
            for given, head, step in zip(modulation.unbind(), heads.unbind(), blocks.unbind())
        ]

    def lay_out_weights(self) -> None:
        """Make streams faster on the device where the weights are: q, k and v of a block in one piece of memory, so
        that one product makes all three, and the layout that products are fastest with. Names and values stay."""
        for block in cast("Sequence[Block]", self.blocks):
            block.lay_out_weights()

    def embed(self, hidden_states: Tensor) -> Tensor:
        """Latents as tokens [B, L, D]."""
        x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        if self.config["position_grid"] is None:
            return x
        return (x.unflatten(1, (hidden_states.shape[2], -1)) + self.position_embedding).flatten(1, 2).type_as(x)

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
        """Embedding [..., G, D] and modulation [..., G, 6, D]; G is 1, the frames or the tokens."""
        if (actions is None) != (self.config["action_dim"] == 0):
            seen = None if actions is None else tuple(actions.shape)
            raise ValueError(f"this model takes actions of width {self.config['action_dim']}, got {seen}")
        embedder = self.condition_embedder
        frequencies = embedder.timesteps_proj(timestep.flatten()).unflatten(0, timestep.shape)
        temb = embedder.time_embedder(frequencies.to(embedder.time_embedder.linear_1.weight.dtype)).to(dtype)
        if actions is not None:
            temb = temb + self.action_embedder(actions.to(dtype))
        return temb, embedder.time_proj(embedder.act_fn(temb)).unflatten(-1, (6, -1))

    def _condition(self, timestep: Tensor, actions: Tensor | None, dtype: torch.dtype) -> Condition:
        """The condition of timesteps [B], [B, F] or [B, L]."""
        temb, modulation = self.embed_time(timestep if timestep.ndim == 2 else timestep[:, None], actions, dtype)
        shift, scale = (self.scale_shift_table + temb.float()[:, :, None]).unbind(2)
        return Condition(modulation, (shift, scale))

    def _context(
        self,
        grid: tuple[int, int, int],
        mask: Tensor | BlockMask | None,
        cache: KVChunk | None,
        block_frames: int,
        plan: Any,
        positions: Tensor | None,
        inputs: Inputs | None,
    ) -> Context:
        """What all blocks of a pass share."""
        rotary, together = self._rotary(*grid, positions, cache), block_frames * grid[1] * grid[2]
        context = Context(rotary, mask, cache, grid, together, self._turn(rotary, positions, cache), plan, inputs)
        if inputs is None:
            return context
        if positions is None:
            positions = torch.arange(grid[0], device=rotary[0].device) if cache is None else cache.positions
        return context._replace(positions=positions if positions.ndim == 2 else positions[None])

    def _rotary(
        self, frames: int, height: int, width: int, positions: Tensor | None, cache: KVChunk | None
    ) -> tuple[Tensor, Tensor]:
        """Angles of every token, the same for all blocks and for all passes over a chunk."""
        head_dim = self.config["attention_head_dim"]
        if positions is not None:
            return rotary_angles(positions, height, width, head_dim)
        if cache is None:
            return rotary_angles(torch.arange(frames, device=self.proj_out.weight.device), height, width, head_dim)
        kind = ("rotary", height, width, head_dim)
        if kind not in cache.memo:
            cache.memo[kind] = rotary_angles(cache.positions, height, width, head_dim)
        return cache.memo[kind]

    def _turn(self, rotary: tuple[Tensor, Tensor], positions: Tensor | None, cache: KVChunk | None) -> Tensor | None:
        """The angles as complex numbers, for streams on a CPU; other devices and compilers rather have them apart."""
        if cache is None or positions is not None or rotary[0].device.type != "cpu" or torch.compiler.is_compiling():
            return None
        if "turn" not in cache.memo:
            cache.memo["turn"] = torch.complex(*rotary).unsqueeze(-2)
        return cache.memo["turn"]
