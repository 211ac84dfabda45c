"""A token transformer at work: what decoding asks of it, step by step, with a cache of fixed memory.

What these steps compute is what `TokenTransformer.forward` computes at once. Shapes as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .token_layers import KeysValues, Rotary, TokenCache, Where


class TokenDecoding:
    """The part of a token transformer that decodes."""

    config: Any
    self_decoder: nn.Module
    cross_decoder: nn.Module
    token_embedding: nn.Module
    scale_embedding: Tensor
    rotary: Callable[..., Rotary]
    _prompt: Callable[[Tensor], Tensor]
    _told: Callable[[Tensor], Tensor | None]
    _first: Callable[[Tensor], Tensor]
    _out: Callable[..., Tensor]
    _placed: Callable[[Tensor, Tensor | None], Tensor]
    _queries: Callable[[Tensor], Tensor]
    _shown: Callable[[Tensor, Tensor], Tensor]
    _share: Callable[[Tensor, Rotary], tuple[Tensor, Tensor]]
    _keys: Callable[[Tensor, int], KeysValues]

    @property
    def prompt_sees_all(self) -> bool:
        """Of kind masked."""
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        """How many a picture has."""
        raise NotImplementedError

    def begin(self, text: Tensor) -> TokenCache:
        """A cache with the prompt [B, S, text_dim] in it, and room for every token."""
        prefix = self._prompt(text)
        if self.config["adaptive"]:
            made = [self._keys(prefix, self.tokens) for _ in range(self.config["num_layers"])]
            return TokenCache(made, None, prefix, prefix)
        capacity = prefix.shape[1] + self.tokens
        made = [self._keys(prefix, capacity) for _ in range(self.config["num_layers"])]
        if self.config["attention"] == "lina":
            return TokenCache(made, None, prefix[:, -1:].clone(), prefix)
        shared = self._keys(prefix, capacity) if self.config["kind"] == "two_pass" else None
        rotary = self.rotary(torch.zeros(0, dtype=torch.int64, device=prefix.device), prefix.shape[1])
        x = self.self_decoder(prefix, Where(rotary, None, made))
        if shared is not None:
            shared.append(*self._share(x, rotary))
        return TokenCache(made, shared, x[:, -1:].clone(), prefix)

    def feed(self, tokens: Tensor, places: Tensor, cache: TokenCache) -> None:
        """Show decided tokens [B, m] (or [B, m, C]) at `places` [B, m]: two_pass and causal. They see one another.

        One token at a time is what training saw; a group that is fed together sees a little more (as ARPG decodes).
        """
        if places.shape[1] == 0:
            return
        rotary = self.rotary(places)
        x = self._placed(self.token_embedding(tokens), places)
        x = self.self_decoder(x, Where(rotary, None, cache.layers))
        if cache.shared is not None:
            cache.shared.append(*self._share(x, rotary))
        cache.last.copy_(x[:, -1:])

    def predict(self, places: Tensor, cache: TokenCache) -> Tensor:
        """Logits [B, n, V] (or conditions) at open `places` [B, n]; of kind causal, of the one that comes next."""
        if cache.shared is None:
            return self._out(cache.last)
        return self._out(self.cross_decoder(self._queries(places), Where(self.rotary(places)), *cache.shared.kept()))

    def predict_scale(self, level: int, given: Tensor | None, cache: TokenCache) -> Tensor:
        """Logits [B, n, V] of a whole scale from its input [B, n, C] (None for the first), kept in the cache."""
        sides = self.config["scale_sides"]
        first = sum(side * side for side in sides[:level])
        x = self._first(cache.prompt) if given is None else self.token_embedding(given)
        x = x + self.scale_embedding[level]
        places = torch.arange(first, first + x.shape[1], device=x.device)
        prefix = cache.layers[0].k.shape[1] - self.tokens
        where = Where(self.rotary(places), None, cache.layers, told=self._told(cache.prompt))
        x = self.self_decoder(self._placed(x, places), where)
        if self.config["scale_mixing"] == "linear":
            for layer in cache.layers:
                layer.length = prefix  # the next scale sees this one through the carried state alone
        return self._out(x, cache.prompt)

    def predict_masked(self, tokens: Tensor, known: Tensor, cache: TokenCache, places: Tensor) -> Tensor:
        """Kind masked: logits [B, n, V] at ascending `places` [B, n] alone; all others keep their cached keys.

        With all places this is `forward`. The prompt's own keys are those of `begin`: it does not see the picture, but
        with turning "line" or linear attention, where it is computed anew too.
        """
        if self.config["attention"] == "lina" and places.shape[1] != self.tokens:
            raise ValueError(
                f"linear attention keeps no keys, so all {self.tokens} places are computed at every step and not "
                f"{places.shape[1]}; take refresh=1 and no budget"
            )
        prefix = cache.layers[0].k.shape[1] - self.tokens
        embedded = self._shown(tokens, known)
        x = embedded.gather(1, places[..., None].expand(-1, -1, embedded.shape[2]))
        rotary, index, again = self.rotary(places), places + prefix, 0
        if self.prompt_sees_all:
            x, again = torch.cat([cache.prompt, x], dim=1), prefix
            rotary = self.rotary(places, prefix)
            own = torch.arange(prefix, device=places.device).expand(len(places), -1)
            index = torch.cat([own, index], dim=1)
        return self._out(self.self_decoder(x, Where(rotary, None, cache.layers, index))[:, again:])
