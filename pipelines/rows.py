"""Rows of a pipeline: memory with fixed addresses that sessions take, keep and give back.

One row by default; taking more makes a larger arena once and moves the rows over, between two steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..models.stream_codec import CodecState
from ..models.transformer import CausalTransformer3DModel, TextKeys
from ..streaming.graphs import Recordings
from ..streaming.kv_cache import KVCache, Rows


class RowArena:
    """The KV cache and the prompt keys of every row, and the steps that were recorded over them.

    Args:
        make_cache: a new cache of that many rows.
        transformer: makes prompt keys.
        limit: recordings that are kept.

    Attributes:
        codecs: what decoders remember of the streams in these rows, by row: made once, as the cache is.
        decodings: recorded decodes, apart from the other steps, since they may run beside them.
    """

    def __init__(
        self, make_cache: Callable[[int], KVCache], transformer: CausalTransformer3DModel, *, limit: int = 24
    ) -> None:
        self.make_cache, self.transformer = make_cache, transformer
        transformer.lay_out_weights()
        self.cache = make_cache(1)
        self.text: list[tuple[Tensor, ...]] = []
        self.silence: TextKeys | None = None  # keys of the empty prompt, once they are needed
        self.free = [0]
        self.codecs: dict[int, CodecState] = {}
        self.recordings, self.decodings = (Recordings(self.cache.device, limit=limit) for _ in range(2))

    @property
    def device(self) -> torch.device:
        return self.cache.device

    @property
    def dtype(self) -> torch.dtype:
        return self.cache.dtype

    @property
    def in_use(self) -> int:
        return self.cache.rows - len(self.free)

    def take(self) -> int:
        """A row with nothing in it."""
        if not self.free:
            self._double()
        row = min(self.free)
        self.free.remove(row)
        self.cache.reset(row)
        for store in (self.cache.k, self.cache.v, self.cache.sink_k):
            store[:, row].zero_()  # what a mask hides must still be finite, and a stream may have left NaN behind
        return row

    def give_back(self, row: int) -> None:
        if row not in self.free:
            self.free.append(row)

    def _double(self) -> None:
        old, count = self.cache, self.cache.rows
        self.cache = self.make_cache(2 * count)
        for row in range(count):
            self.cache.restore(row, old.snapshot(row))
        self.text = [tuple(torch.cat([part, part]) for part in layer) for layer in self.text]
        self.recordings.forget()
        self.decodings.forget()
        self.free = list(range(count, 2 * count))

    def read_prompt(self, row: int, tokens: Tensor) -> None:
        """Let `row` attend to a prompt's tokens [1, S, D] from the next pass on."""
        keys = self.transformer.embed_text(tokens)
        if not self.text:
            self.text = [tuple(part.repeat(self.cache.rows, 1, 1, 1) for part in layer) for layer in keys]
        for layer, parts in zip(self.text, keys):
            for arena, part in zip(layer, parts):
                arena[row] = part[0]

    def prompts(self, rows: Rows) -> TextKeys:
        """The prompt keys of `rows`, for a pass over them."""
        return [tuple(rows.take(part) for part in layer) for layer in self.text]
