"""One transformer over picture (or video, or sound) tokens, for every way of decoding them.

    kind        who sees whom                                   decoded
    two_pass    known tokens see known ones; queries, rotated   in any order, any number at once, with a cache (ARPG)
                to their targets, see known tokens only
    masked      everyone sees everyone, open places are [MASK]  the surest first (MaskGIT); delayed caching
    causal      each sees those before it                       one after the other (raster)
    scales      each scale sees the coarser ones and itself     scale after scale (VAR)

The prompt is a prefix of tokens without a place; it is always seen. Shapes: B batch, N tokens, S prompt tokens, V
vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .packed import PackedModelMixin
from .token_adaptive import PARTS, AdaptiveNorm, Modulation
from .token_config import EXTRA, Attention, Kind, Mixing, Turning, check_attention, check_config
from .token_decoding import TokenDecoding
from .token_layers import Heads, KeysValues, Rotary, Stack, Style, Where, causal_mask, token_places, turns


class TokenTransformer(TokenDecoding, PackedModelMixin, ModelMixin, ConfigMixin):
    """Predicts tokens from tokens and a prompt.

    Sources: ARPG (arXiv:2503.10568) for two_pass, MaskGIT (arXiv:2202.04200) for masked, VAR (arXiv:2404.02905) for
    scales, LlamaGen (arXiv:2406.06525) for causal and for the layers.

    Args:
        kind: see the module.
        vocab_size: V.
        token_channels: width C of tokens that are vectors; the outputs are then conditions [.., D] for a flow head. For
            kind "scales" that of its inputs, the codec's latents, and needed: it predicts discrete tokens all the same.
        grid: sides of the token grid: (rows, columns), or (frames, rows, columns). For kind "scales" it is the last.
        dim, num_heads, ffn_dim: of every layer.
        num_layers: self-attention layers.
        num_cross_layers: layers of the second pass; of kind two_pass only.
        text_dim: width of the prompt's tokens.
        scale_sides: sides of the square maps, coarse to fine; of kind "scales" only.
        scale_mixing: of kind "scales": "attention" to coarser scales (VAR), or "linear": attention inside a scale and a
            linear state carried from scale to scale (M-VAR, arXiv:2411.10433, with linear attention for its Mamba).
        learned_positions: add a learnt vector for every place. By rotation alone a query knows its place only from whom
            it attends to, which a model of few layers learns slowly.
        num_classes: the prompt is a label, int64 [B], from 0 to num_classes - 1, or num_classes for none; text_dim is
            then not used. Where `text` is asked for below, labels are given.
        normed_heads: normalise queries and keys head by head; ARPG and MaskGIL do not.
        norm_eps: of the norms of layers.
        turning: "grid" turns tokens to their place on the grid and the prompt not at all; "muted" is ARPG's: the
            prompt's queries and keys are 0; "line" MaskGIL's: one row of places that ends with the prompt, of which
            the first token is muted, and the prompt sees the picture.
        adaptive: VAR's layers, which a label tells by scaling and shifting; nothing is turned then.
        shared_modulation: of adaptive layers: the label is projected once for all (VAR at 512 x 512).
        attention: "softmax", or "lina" for linear attention with gates, of kind "masked".

    Raises:
        ValueError: a kind that does not exist or sizes that contradict it.
    """

    @register_to_config
    def __init__(
        self,
        kind: Kind = "two_pass",
        vocab_size: int = 1024,
        grid: tuple[int, ...] = (16, 16),
        dim: int = 192,
        num_heads: int = 3,
        ffn_dim: int = 512,
        num_layers: int = 4,
        num_cross_layers: int = 4,
        text_dim: int = 128,
        token_channels: int | None = None,
        scale_sides: Sequence[int] | None = None,
        scale_mixing: Mixing = "attention",
        learned_positions: bool = False,
        num_classes: int | None = None,
        normed_heads: bool = True,
        norm_eps: float = 1e-6,
        turning: Turning = "grid",
        adaptive: bool = False,
        shared_modulation: bool = False,
        attention: Attention = "softmax",
    ) -> None:
        super().__init__()
        layout = (scale_sides, token_channels, scale_mixing, turning, adaptive, num_classes)
        check_config(kind, grid, num_cross_layers, *layout)
        check_attention(attention, kind, grid, turning, learned_positions)
        linear_grid = (grid[0], grid[1]) if attention == "lina" else None
        style = Style(normed_heads, norm_eps, adaptive, shared_modulation, linear_grid)
        discrete = token_channels is None
        self.token_embedding = nn.Embedding(vocab_size, dim) if discrete else nn.Linear(token_channels, dim)
        if num_classes is None:
            self.text_projection = nn.Linear(text_dim, dim)
        else:
            self.class_embedding = nn.Embedding(num_classes + 1, dim)
        self.self_decoder = Stack(num_layers, dim, num_heads, ffn_dim, style, mixes=scale_mixing == "linear")
        self.mask_embedding = nn.Parameter(torch.randn(dim) * 0.02)
        if kind == "two_pass":
            self.norm_shared = nn.RMSNorm(dim, eps=norm_eps)
            self.to_shared = nn.Linear(dim, 2 * dim, bias=False)
            self.shared_key = Heads(num_heads, dim // num_heads, normed=normed_heads)
            self.cross_decoder = Stack(num_cross_layers, dim, num_heads, ffn_dim, style, cross=True)
        if kind == "scales":
            self.scale_embedding = nn.Parameter(torch.randn(len(scale_sides or ()), dim) * 0.02)
        self.modulation = Modulation(dim, PARTS) if shared_modulation else None
        self.norm_out = AdaptiveNorm(dim) if adaptive else nn.RMSNorm(dim, eps=norm_eps)
        has_logits = discrete or kind == "scales"
        self.head = nn.Linear(dim, vocab_size, bias=adaptive) if has_logits else nn.Identity()
        places = token_places(grid, scale_sides)
        if learned_positions:
            self.position_embedding = nn.Parameter(torch.randn(len(places), dim) * 0.02)
        cos, sin = turns(places, dim // num_heads, turning)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Small at first: what a residual layer adds shrinks with depth, and the head begins near uniform."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and not name.endswith("_embedding"):
                nn.init.normal_(parameter, std=0.02)
        depth = self.config["num_layers"] + self.config["num_cross_layers"]
        for name, parameter in self.named_parameters():
            if name.endswith(("to_out.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth))

    @property
    def tokens(self) -> int:
        """N."""
        return self.cos.shape[0] - (self.config["turning"] == "line")

    @property
    def prompt_sees_all(self) -> bool:
        """Of kind masked: whether the prompt sees the picture, so that its keys change with it."""
        return self.config["turning"] == "line" or self.config["attention"] == "lina"

    @property
    def places(self) -> Tensor:
        """Coordinates [N, A] of the tokens; cells of a coarse scale stand in the middle of what they cover."""
        return token_places(self.config["grid"], self.config["scale_sides"]).to(self.cos.device)

    def rotary(self, places: Tensor | None, prefix: int = 0) -> Rotary:
        """Angles of `prefix` tokens without a place, then of `places` [B, n] (None: all of the grid, in order)."""
        line = self.config["turning"] == "line"
        cos, sin = (angles[: self.tokens] if places is None else angles[places] for angles in (self.cos, self.sin))
        if prefix:
            shape = (*cos.shape[:-2], prefix, cos.shape[-1])
            if line:
                first = [angles[-1].expand(shape) for angles in (self.cos, self.sin)]
            else:
                first = [cos.new_full(shape, float(self.config["turning"] == "grid")), cos.new_zeros(shape)]
            cos, sin = (torch.cat(pair, dim=-2) for pair in zip(first, (cos, sin)))
        return cos, sin

    def _prompt(self, text: Tensor) -> Tensor:
        """Text [B, S, text_dim] or labels [B], projected: [B, S, D]."""
        if self.config["num_classes"] is None:
            return self.text_projection(text)
        if text.ndim != 1 or text.is_floating_point():
            raise ValueError(f"this model is told labels, int64 [B], got {list(text.shape)} in {text.dtype}")
        return self.class_embedding(text)[:, None]

    def _told(self, prompt: Tensor) -> Tensor | None:
        """What adaptive layers are told of a prompt [B, 1, D]."""
        if not self.config["adaptive"]:
            return None
        return prompt[:, 0] if self.modulation is None else self.modulation(prompt[:, 0])

    def forward(
        self, tokens: Tensor, text: Tensor, *, order: Tensor | None = None, known: Tensor | None = None
    ) -> Tensor:
        """What training needs: all predictions at once.

        Args:
            tokens: int64 [B, N] (or [B, N, C] if continuous), in the order of the grid; for kind "scales" the inputs
                [B, N, C] of all scales but the first, one after the other (`Scales.next_input`).
            text: [B, S, text_dim].
            order: int64 [B, N], a permutation of the places for each row (two_pass only; needed).
            known: bool [B, N], which tokens are shown (masked only; needed).

        Returns:
            Logits [B, N, V] (or conditions [B, N, D]): for two_pass in the order of `order`, else of the grid. Each is
            computed from what decoding would know at that moment.
        """
        kind: Kind = self.config["kind"]
        if (kind == "two_pass", kind == "masked") != (order is not None, known is not None):
            raise ValueError(f'kind "{kind}" takes {EXTRA[kind]}; give that and nothing else')
        prefix = self._prompt(text)
        if kind == "two_pass":
            return self._two_pass(tokens, prefix, cast("Tensor", order))
        if kind == "masked":
            x = torch.cat([prefix, self._shown(tokens, cast("Tensor", known))], dim=1)
            seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
            if not self.prompt_sees_all:
                seen[: prefix.shape[1], prefix.shape[1] :] = False  # so that the prompt's keys can be cached
            x = self.self_decoder(x, Where(self.rotary(None, prefix.shape[1]), seen))
            return self._out(x[:, prefix.shape[1] :])
        if kind == "scales":
            return self._scales(tokens, prefix)
        x = torch.cat([prefix, self._placed(self.token_embedding(tokens), None)[:, :-1]], dim=1)
        mask = causal_mask(prefix.shape[1], self.tokens - 1, x.device)
        cos, sin = self.rotary(None, prefix.shape[1])
        x = self.self_decoder(x, Where((cos[:-1], sin[:-1]), mask))
        return self._out(x[:, prefix.shape[1] - 1 :])

    def _two_pass(self, tokens: Tensor, prefix: Tensor, order: Tensor) -> Tensor:
        index = order if tokens.ndim == 2 else order[..., None].expand(-1, -1, tokens.shape[2])
        shown = order[:, :-1]
        known = self._placed(self.token_embedding(tokens.gather(1, index)[:, :-1]), shown)
        x = torch.cat([prefix, known], dim=1)
        mask = causal_mask(prefix.shape[1], shown.shape[1], x.device)
        rotary = self.rotary(shown, prefix.shape[1])
        k, v = self._share(self.self_decoder(x, Where(rotary, mask)), rotary)
        queries = self._queries(order)
        # The query of the i-th token sees the prompt and the i tokens before it: the mask's rows from the last prompt
        # token on.
        where = Where(self.rotary(order), mask[prefix.shape[1] - 1 :])
        return self._out(self.cross_decoder(queries, where, k, v))

    def _scales(self, inputs: Tensor, prefix: Tensor) -> Tensor:
        sides = self.config["scale_sides"]
        sizes = [side * side for side in sides]
        scale = torch.arange(len(sides), device=prefix.device).repeat_interleave(
            torch.tensor(sizes, device=prefix.device)
        )
        told, first = self._told(prefix), self._first(prefix)
        x = torch.cat([first, self.token_embedding(inputs)], dim=1) + self.scale_embedding[scale]
        x = self._placed(x, None)
        if told is not None:
            seen = scale[:, None] >= scale[None]
            return self._out(self.self_decoder(x, Where(self.rotary(None), seen, told=told)), prefix)
        x = torch.cat([prefix, x], dim=1)
        level = torch.cat([scale.new_full((prefix.shape[1],), -1), scale])
        seen = level[:, None] >= level[None]
        if self.config["scale_mixing"] == "linear":
            seen &= (level[None] == -1) | (level[:, None] == level[None])
        where = Where(self.rotary(None, prefix.shape[1]), seen, segments=(prefix.shape[1], *sizes))
        x = self.self_decoder(x, where)
        return self._out(x[:, prefix.shape[1] :])

    def _shown(self, tokens: Tensor, known: Tensor) -> Tensor:
        return self._placed(torch.where(known[..., None], self.token_embedding(tokens), self.mask_embedding), None)

    def _queries(self, places: Tensor) -> Tensor:
        return self._placed(self.mask_embedding.expand(*places.shape, -1), places)

    def _placed(self, x: Tensor, places: Tensor | None) -> Tensor:
        """`x` [B, n, D] at `places` [B, n] (None: all, in order) with the learnt vectors of those places."""
        if not self.config["learned_positions"]:
            return x
        return x + (self.position_embedding if places is None else self.position_embedding[places])

    def _share(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """The one pair of keys and values [B, L, H, d] that every layer of the second pass looks at."""
        k, v = self.to_shared(self.norm_shared(x)).chunk(2, dim=-1)
        return self.shared_key(k, rotary), v.unflatten(-1, (self.config["num_heads"], -1))

    def _first(self, prompt: Tensor) -> Tensor:
        """The input of the first scale [B, 1, D]."""
        first = self.mask_embedding.expand(prompt.shape[0], 1, -1)
        return first + prompt if self.config["adaptive"] else first

    def _out(self, x: Tensor, prompt: Tensor | None = None) -> Tensor:
        if isinstance(self.norm_out, AdaptiveNorm):
            assert prompt is not None, "the last norm is told the prompt"
            return self.head(self.norm_out(x, prompt[:, 0]))
        return self.head(self.norm_out(x))

    def _keys(self, like: Tensor, capacity: int) -> KeysValues:
        heads, dim = self.config["num_heads"], self.config["dim"]
        return KeysValues(like, like.shape[0], capacity, heads, dim // heads)
