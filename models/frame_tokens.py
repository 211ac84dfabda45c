"""Frames of residual codes, one after the other or several per pass, streamed in fixed memory.

A causal transformer reads the frames so far. What it says about the next frame goes to a small transformer over the
levels of that frame, which draws them coarse to fine (depth). Behind it stand chained heads of one layer each: the i-th
takes what the one before it said and the frame that was drawn from that, and says what comes next; so one pass of the
large model gives several frames, the first of them at once.

A head is as causal as the model is: at every frame it sees its own earlier frames through the same window, so the
frames of a stream are those of one forward over all of it.

Sources: VITA-Audio's multiple cross-modal token prediction (arXiv:2505.03739) for the chain, with the layers of
DeepSeek-V3's multi-token prediction (arXiv:2412.19437, section 2.2); RQ-Transformer (arXiv:2203.01941) and Moshi
(arXiv:2410.00037) for depth. Shapes: R rows, Q levels, T frames, V codes per level, D width, E width of depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..streaming.kv_cache import KVCache, KVChunk, Window
from .level_tokens import LevelTokens, embed_together
from .packed import PackedModelMixin
from .token_layers import KeysValues, Rotary, SelfBlock, Stack, Where, axial_angles, causal_mask

Choose = Callable[[int, Tensor], Tensor]
"""(level, logits [R, V]) to codes [R]."""


class ChunkLayer:
    """One layer of an open chunk, as the layers of a token transformer ask for a cache."""

    def __init__(self, chunk: KVChunk, layer: int) -> None:
        self.chunk, self.layer = chunk, layer

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        view = self.chunk.attend_view(self.layer, k, v)
        return view.k, view.v


class DepthTransformer(nn.Module):
    """The codes of one frame, level after level, each from the coarser ones and from what is known about the frame."""

    def __init__(self, condition_dim: int, levels: int, vocab_size: int, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.condition = nn.Linear(condition_dim, dim)
        self.tokens = LevelTokens(levels, vocab_size, dim)
        self.places = nn.Parameter(torch.randn(levels, dim) * 0.02)
        self.layers = Stack(layers, dim, heads, 4 * dim)
        self.norm_out = nn.RMSNorm(dim, eps=1e-6)
        self.heads = nn.ModuleList(nn.Linear(dim, vocab_size, bias=False) for _ in range(levels))
        self.shape = (heads, dim // heads)

    def forward(self, said: Tensor, codes: Tensor) -> Tensor:
        """Logits [M, Q, V] of every level of M frames from what is said about them [M, D] and their codes [M, Q]."""
        levels = codes.shape[1]
        known = [self.tokens.embed(level, codes[:, level : level + 1]) for level in range(levels - 1)]
        x = self.condition(said)[:, None] + self.places[:levels]
        x = x + torch.cat([torch.zeros_like(x[:, :1]), *known], dim=1)
        mask = causal_mask(0, levels, x.device)
        x = self.norm_out(self.layers(x, Where(self._rotary(levels, x.device), mask)))
        return torch.stack([head(x[:, level]) for level, head in enumerate(self.heads)], dim=1)

    def draw(self, said: Tensor, choose: Choose) -> Tensor:
        """The codes [M, Q] of M frames."""
        levels = len(self.heads)
        caches = [KeysValues(said, said.shape[0], levels, *self.shape) for _ in self.layers.blocks]
        cos, sin = self._rotary(levels, said.device)
        given, codes = self.condition(said)[:, None], []
        for level, head in enumerate(self.heads):
            x = given + self.places[level]
            if level:
                x = x + self.tokens.embed(level - 1, codes[-1][:, None])
            where = Where((cos[level : level + 1], sin[level : level + 1]), None, caches)
            codes.append(choose(level, head(self.norm_out(self.layers(x, where)))[:, 0]))
        return torch.stack(codes, dim=1)

    def _rotary(self, levels: int, device: torch.device) -> Rotary:
        return axial_angles(torch.arange(levels, device=device)[:, None], self.shape[1])


class ChainedHead(SelfBlock):
    """One layer that goes on from what was said about a frame and from the frame that was drawn."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__(dim, heads, hidden)
        self.norm_said, self.norm_drawn = (nn.RMSNorm(dim, eps=1e-6) for _ in range(2))
        self.join = nn.Linear(2 * dim, dim, bias=False)

    def joined(self, said: Tensor, drawn: Tensor) -> Tensor:
        return self.join(torch.cat([self.norm_said(said), self.norm_drawn(drawn)], dim=-1))


class FrameTokenTransformer(PackedModelMixin, ModelMixin, ConfigMixin):
    """Predicts the frames of a codec's codes from those before them and from conditioning tokens that run along.

    Args:
        levels: Q, of the codec.
        vocab_size: V.
        condition_size: how many conditioning tokens there are, one per frame; None for none.
        dim, num_heads, ffn_dim, num_layers: of the large model; the chained heads have the same layers.
        depth_dim, depth_heads, depth_layers: of the transformer over levels.
        chained: heads behind the large model; a pass gives up to 1 + chained frames.
        window: frames that a frame looks back on, itself included.
    """

    @register_to_config
    def __init__(
        self,
        levels: int = 8,
        vocab_size: int = 1024,
        condition_size: int | None = 1024,
        dim: int = 512,
        num_heads: int = 8,
        ffn_dim: int = 1408,
        num_layers: int = 8,
        depth_dim: int = 256,
        depth_heads: int = 4,
        depth_layers: int = 2,
        chained: int = 0,
        window: int = 250,
    ) -> None:
        super().__init__()
        self.tokens = LevelTokens(levels, vocab_size, dim)
        self.first = nn.Parameter(torch.randn(dim) * 0.02)
        self.condition = None if condition_size is None else nn.Embedding(condition_size, dim)
        self.layers = Stack(num_layers, dim, num_heads, ffn_dim)
        self.chain = nn.ModuleList(ChainedHead(dim, num_heads, ffn_dim) for _ in range(chained))
        self.depth = DepthTransformer(dim, levels, vocab_size, depth_dim, depth_heads, depth_layers)

    @property
    def window(self) -> Window:
        return Window(self.config["window"])

    def make_cache(self, rows: int = 1, frames_per_pass: int = 1) -> KVCache:
        """Memory of `rows` streams, the same however long they run: the window, and what a pass adds to it."""
        config, weight = self.config, self.first
        return KVCache(
            layers=config["num_layers"] + config["chained"],
            rows=rows,
            heads=config["num_heads"],
            head_dim=config["dim"] // config["num_heads"],
            tokens_per_frame=1,
            window=Window(config["window"] + frames_per_pass - 1),
            device=weight.device,
            dtype=weight.dtype,
        )

    def forward(self, codes: Tensor, condition: Tensor | None = None) -> list[Tensor]:
        """What training needs: logits of every frame, by the large model and by each chained head.

        Args:
            codes: int64 [R, Q, T].
            condition: int64 [R, T] or [R, T, m].

        Returns:
            Tensors [R, T - i, Q, V] of the large model (i = 0) and of each head; the i-th begins with frame i, the
            first that its head can say. A clip of few frames has none for the last heads.
        """
        frames = codes.shape[2]
        drawn, told = self.tokens.total(codes), self.told(condition, codes.shape[0], frames)
        rotary = self.rotary(torch.arange(frames, device=codes.device))
        where = Where(rotary, self.window.mask(frames, 1, codes.device))
        first = self.first.expand(codes.shape[0], 1, -1)
        said = self.layers(torch.cat([first, drawn[:, :-1]], dim=1) + told, where)
        every = [said]
        for number in range(1, min(len(self.chain) + 1, frames)):
            left = frames - number
            where = Where((rotary[0][:left], rotary[1][:left]), self.window.mask(left, 1, codes.device))
            given = drawn[:, number - 1 : frames - 1] + told[:, number:]
            every.append(self.link(number, every[-1][:, :left], given, where))
        return [self.logits(said, codes[:, :, number:]) for number, said in enumerate(every)]

    def logits(self, said: Tensor, codes: Tensor) -> Tensor:
        """[R, T, Q, V] of frames [R, Q, T] from what is said about them [R, T, D]."""
        flat = self.depth(said.flatten(0, 1), codes.transpose(1, 2).flatten(0, 1))
        return flat.unflatten(0, said.shape[:2])

    def link(self, number: int, said: Tensor, given: Tensor, where: Where) -> Tensor:
        """What the chained head `number` (from 1) says [R, n, D], from what the one before it said and was `given`."""
        head = cast("ChainedHead", self.chain[number - 1])
        return head(head.joined(said, given), where, 0)

    def told(self, condition: Tensor | None, rows: int, frames: int) -> Tensor:
        """What conditioning tokens [R, T], or [R, T, m] with m per frame, tell each frame: [R, T, D].

        Raises:
            ValueError: tokens for a model without, or none or another number for a model with.
        """
        shape = None if self.condition is None else (rows, frames)
        if (None if condition is None else tuple(condition.shape[:2])) != shape:
            wanted = "none" if shape is None else f"int64 {list(shape)}, one per frame"
            seen = "none" if condition is None else list(condition.shape)
            raise ValueError(f"this model's conditioning tokens must be {wanted}, got {seen}")
        if self.condition is None or condition is None:
            return self.first.new_zeros(rows, frames, self.config["dim"])
        return embed_together(self.condition, condition)

    def rotary(self, frames: Tensor) -> Rotary:
        """Angles of frames int64 [.., n]."""
        return axial_angles(frames[..., None], self.config["dim"] // self.config["num_heads"])

    def seen(self, chunk: KVChunk) -> Tensor:
        """Bool [R, 1, n, K]: which slots of the ring each frame of a chunk sees. Frames of one chunk are causal too."""
        slots = chunk.slot_frames[:, None]
        return (self.window.visible(chunk.positions[..., None], slots) & (slots >= 0))[:, None]

    def caches(self, chunk: KVChunk, head: int = 0) -> Sequence[Any]:
        """Those of the large model, or of the chained head `head`."""
        count = self.config["num_layers"]
        layers = range(count) if head == 0 else [count + head - 1]
        return [ChunkLayer(chunk, layer) for layer in layers]
