"""One transformer over words and pictures: causal where there are words, everything at once inside a picture.

A sequence is segments in any order: words (int64 [B, n]) and pictures (float [B, N, C], noisy latents). A word sees
what came before it; a picture's token sees what came before its picture, and its whole picture (MonoFormer). Words are
predicted one after the other, pictures are denoised by flow. With `routed` every layer has weights of its own for each
of the two, and only attention is shared (Mixture-of-Transformers).

Sources: MonoFormer (arXiv:2409.16280); Mixture-of-Transformers (arXiv:2411.04996), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import attend
from .flow_head import frequencies
from .packed import PackedModelMixin
from .token_layers import Heads, KeysValues, Rotary, SwiGLU, axial_angles

WORDS, PICTURE = 0, 1


class Weights(nn.Module):
    """Of one layer, for one kind of token: everything but attention itself."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(dim, eps=1e-6) for _ in range(2))
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.query, self.key = (Heads(heads, dim // heads) for _ in range(2))
        self.feed_forward = SwiGLU(dim, hidden)

    def asks(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, L, H, d] of x [B, L, D]."""
        q, k, v = self.to_qkv(self.norm1(x)).chunk(3, dim=-1)
        return self.query(q, rotary), self.key(k, rotary), v.unflatten(-1, (self.key.heads, -1))

    def goes_on(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.to_out(mixed.flatten(2))
        return x + self.feed_forward(self.norm2(x))


class MixedTransformer(PackedModelMixin, ModelMixin, ConfigMixin):
    """Predicts the next word, and the velocity of a picture.

    Args:
        vocab_size: of words.
        channels: C, of a picture's latents.
        picture_tokens: N, of a picture; each place has a learnt vector. The whole picture is one place in the sequence.
        dim, num_heads, ffn_dim, num_layers: of the layers.
        routed: weights of their own for words and pictures; else both share them.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 256,
        channels: int = 16,
        picture_tokens: int = 64,
        dim: int = 192,
        num_heads: int = 3,
        ffn_dim: int = 512,
        num_layers: int = 6,
        routed: bool = False,
    ) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(vocab_size, dim)
        self.picture_in, self.places = nn.Linear(channels, dim), nn.Parameter(torch.randn(picture_tokens, dim) * 0.02)
        self.level = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        kinds = 2 if routed else 1
        self.blocks = nn.ModuleList(
            nn.ModuleList(Weights(dim, num_heads, ffn_dim) for _ in range(kinds)) for _ in range(num_layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-6) for _ in range(2))
        self.to_words, self.to_velocity = nn.Linear(dim, vocab_size, bias=False), nn.Linear(dim, channels)

    def forward(self, segments: Sequence[Tensor], sigmas: Sequence[Tensor | None]) -> list[Tensor]:
        """Everything at once, as training needs it.

        Args:
            segments: words int64 [B, n] and noisy pictures [B, N, C], as they follow each other.
            sigmas: of each picture its noise levels [B]; None for words.

        Returns:
            For each segment the logits of the word after each of its words [B, n, V], or its velocity [B, N, C].

        Raises:
            ValueError: a segment of another shape, or without its levels.
        """
        self._check(segments, sigmas)
        kinds, lengths = [kind_of(part) for part in segments], [part.shape[1] for part in segments]
        parts = [self._embedded(part, sigma) for part, sigma in zip(segments, sigmas)]
        turns = self._turns(kinds, lengths, 0)
        mask = mixed_mask(kinds, lengths, device=parts[0].device)
        for block in self.blocks:
            parts = self._layer(block, parts, kinds, turns, lambda q, k, v: attend(q, k, v, mask=mask))
        return [self._out(part, kind) for part, kind in zip(parts, kinds)]

    def begin(self, batch: int, capacity: int) -> MixedCache:
        """Memory for `capacity` tokens of each row."""
        heads, dim, like = self.config["num_heads"], self.config["dim"], self.word_embedding.weight
        layers = [KeysValues(like, batch, capacity, heads, dim // heads) for _ in self.blocks]
        return MixedCache(layers)

    def feed(self, segment: Tensor, cache: MixedCache, sigma: Tensor | None = None, *, keep: bool = True) -> Tensor:
        """The output of the segment that follows what is kept, as `forward` gives it. Words may come in pieces.

        Args:
            keep: whether later segments see this one. A picture is fed noisy at every step of its denoising and kept
                once it is clean.
        """
        self._check([segment], [sigma])
        kind, length = kind_of(segment), segment.shape[1]
        parts, before = [self._embedded(segment, sigma)], cache.layers[0].length
        turns = self._turns([kind], [length], cache.place)
        mask = mixed_mask([kind], [length], before=before, device=segment.device)
        for block, layer in zip(self.blocks, cache.layers):
            parts = self._layer(
                block, parts, [kind], turns, lambda q, k, v, layer=layer: attend(q, *layer.append(k, v), mask=mask)
            )
            if not keep:
                layer.length = before
        if keep:
            cache.place += length if kind == WORDS else 1
        return self._out(parts[0], kind)

    def _layer(
        self,
        block: Any,  # a list of `Weights`
        parts: Sequence[Tensor],
        kinds: Sequence[int],
        turns: Sequence[Rotary],
        attention: Callable[..., Tensor],
    ) -> list[Tensor]:
        weights = [block[kind if self.config["routed"] else 0] for kind in kinds]
        asked = [own.asks(part, turn) for own, part, turn in zip(weights, parts, turns)]
        mixed = attention(*(torch.cat(tensors, dim=1) for tensors in zip(*asked)))
        back = mixed.split([part.shape[1] for part in parts], dim=1)
        return [own.goes_on(part, own_mixed) for own, part, own_mixed in zip(weights, parts, back)]

    def _embedded(self, part: Tensor, sigma: Tensor | None) -> Tensor:
        if sigma is None:
            return self.word_embedding(part)
        level = self.level(frequencies(sigma.float(), self.config["dim"]).to(part.dtype))
        return self.picture_in(part) + self.places + level[:, None]

    def _turns(self, kinds: Sequence[int], lengths: Sequence[int], first: int) -> list[Rotary]:
        """A word is one place further on; a picture is one place as a whole."""
        turns, device = [], self.places.device
        for kind, length in zip(kinds, lengths):
            places = first + torch.arange(length, device=device) * (kind == WORDS)
            turns.append(axial_angles(places[:, None], self.config["dim"] // self.config["num_heads"]))
            first += length if kind == WORDS else 1
        return turns

    def _out(self, part: Tensor, kind: int) -> Tensor:
        return (self.to_words, self.to_velocity)[kind](self.norms[kind](part))

    def _check(self, segments: Sequence[Tensor], sigmas: Sequence[Tensor | None]) -> None:
        shape = [self.config["picture_tokens"], self.config["channels"]]
        for part, sigma in zip(segments, sigmas, strict=True):
            words = kind_of(part) == WORDS
            if part.ndim != (2 if words else 3) or (not words and list(part.shape[1:]) != shape):
                raise ValueError(
                    f"a segment is words int64 [B, n] or a picture [B, {shape[0]}, {shape[1]}], got {list(part.shape)}"
                )
            if words != (sigma is None):
                raise ValueError("every picture needs its noise levels [B] (0 for a clean one), and words need None")


class MixedCache:
    """What a sequence has said so far: keys and values per layer, and the place that comes next."""

    def __init__(self, layers: list[KeysValues]) -> None:
        self.layers, self.place = layers, 0


def kind_of(segment: Tensor) -> int:
    return PICTURE if segment.is_floating_point() else WORDS


def mixed_mask(
    kinds: Sequence[int], lengths: Sequence[int], *, before: int = 0, device: torch.device | None = None
) -> Tensor:
    """Who sees whom, bool [L, before + L]: everyone all that came `before` and earlier segments; inside its own a word
    those up to itself, a picture all of itself."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    whole = torch.tensor(kinds)[segment] == PICTURE
    index = torch.arange(len(segment))
    own = (segment[:, None] == segment[None]) & whole[:, None]
    seen = own | (index[:, None] >= index[None])
    return F.pad(seen, (before, 0), value=True).to(device)


def paint(model: MixedTransformer, cache: MixedCache, noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """A picture [B, N, C] after what `cache` holds: denoised from `noise` by Euler's rule, then kept."""
    for sigma, after in pairwise(sigmas):
        velocity = model.feed(noise, cache, noise.new_full((len(noise),), sigma), keep=False)
        noise = noise + (after - sigma) * velocity
    model.feed(noise, cache, noise.new_zeros(len(noise)))
    return noise


def write(model: MixedTransformer, cache: MixedCache, last: Tensor, count: int) -> Tensor:
    """The likeliest `count` words [B, count] after `last` [B, n], which is fed first."""
    words: list[Tensor] = []
    for _ in range(count):
        last = model.feed(last, cache)[:, -1:].argmax(dim=-1)
        words.append(last)
    return torch.cat(words, dim=1)
