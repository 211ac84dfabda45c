"""The plan of a block-sparse attention: which key blocks each query block visits, and how the rest is treated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..backend import runs_triton
from .masks import Mask


@dataclass(frozen=True, eq=False)
class Permutation:
    """Another order of the tokens, with padding where a tile or cluster is not full.

    Attributes:
        q_source, k_source: int32 [B or 1, H or 1, slots], the token that each slot holds, -1 for none; None: in order.
    """

    q_source: Tensor | None
    k_source: Tensor | None


@dataclass(frozen=True, eq=False)
class KVSummary:
    """What is kept of each key block for `rest="centroid"`.

    Attributes:
        key, value: mean key and mean value, [B, H, NK, D].
        count: valid tokens per block, int32 [B or 1, H or 1, NK].
        slope: [B, H, D, D], mean over all tokens of (k - its block's mean)^T v: PISA's first-order term, shared by all
            blocks. None leaves it out.
    """

    key: Tensor
    value: Tensor
    count: Tensor
    slope: Tensor | None = None

    @classmethod
    def of(
        cls,
        k: Tensor,
        v: Tensor,
        block: int,
        *,
        lengths: Tensor | None = None,
        table: Tensor | None = None,
        first_order: bool = False,
    ) -> KVSummary:
        """Summarise k, v [B, L, H, D] (in slot order), with the plan's key `lengths` and `table`."""
        tokens = k.shape[1]
        blocks = -(-tokens // block)
        count = (tokens - torch.arange(blocks, device=k.device, dtype=torch.int32) * block).clamp_max(block)
        count = count[None, None]
        place = None if table is None else table.long()[:, None]
        if place is not None:
            count = count.expand(place.shape[0], 1, -1).gather(2, place)
        if lengths is not None:
            count = torch.minimum(count, lengths)
        if place is None and lengths is None and _runs_fast(k, v):
            from .summary_triton import summarise_triton

            with torch.cuda.device_of(k):
                key, value, slope = summarise_triton(k, v, block, first_order)
            return cls(key, value, count, slope)
        if place is None and lengths is None:
            key, value = (_block_means(x, block) for x in (k, v))
        else:
            k, v = (_valid_blocks(x, block, place, count) for x in (k, v))  # [B, H, blocks, block, D]
            share = 1.0 / count.clamp_min(1)[..., None]
            key, value = ((x.sum(3, dtype=_wide(x)) * share).to(x.dtype) for x in (k, v))
            k, v = (x.permute(0, 2, 3, 1, 4).flatten(1, 2) for x in (k, v))
        slope = None
        if first_order:
            # Keys less their mean, before the product: of two large products little would be left in bfloat16.
            means = key.transpose(1, 2).repeat_interleave(block, 1)[:, : k.shape[1]]
            inside = (k - means).transpose(1, 2)
            if place is not None or lengths is not None:
                inside = inside * _known(count, block).flatten(2)[..., None]
            total = count.sum(-1)[..., None, None].clamp_min(1)
            slope = (inside.mT @ v.transpose(1, 2) / total).to(k.dtype)
        return cls(key, value, count, slope)


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Which key blocks each query block visits. Device tensors of fixed shapes only, so a CUDA graph may hold it.

    Key blocks are *logical*: block j holds the key slots j * block[1] ... (j + 1) * block[1]; `table` says where it
    lies in memory. Tensors that say [B or 1, H or 1, ...] are broadcast.

    Attributes:
        block: (query, key) block sizes, multiples of 64 for the Triton kernel.
        indices: int32 [B or 1, H or 1, NQ, W]: full blocks first, then masked ones; what follows is ignored, but must
            be a valid block number. A full block has every key visible, and valid too unless `permutation` moves the
            keys. An empty block may be listed as masked, which costs time only.
        n_full, n_masked: int32 [B or 1, H or 1, NQ].
        lengths: valid tokens at the head of each (query, key) block, int32 [B or 1, H or 1, NQ] and [..., NK]: ragged
            tiles, clusters. None: all, up to the end of q and k.
        mask: how masked blocks are cut.
        bias: float32, added to the scores of a whole key block, [B or 1, H or 1, NK] or [B or 1, H or 1, NQ, NK].
        table: int32 [B or 1, NK], logical to physical key blocks: rings, pages.
        rest: blocks that are not listed are dropped ("skip") or approximated by their centroid.
        summary: of the keys and values, for "centroid"; None: made at each call.
        first_order: whether a summary made at a call has a slope.
        permutation: the tokens' order in slots; None: as they come.
        key_blocks: how many key blocks there are, listed or not; 0 where the maker of the plan did not say.
    """

    block: tuple[int, int]
    indices: Tensor
    n_full: Tensor
    n_masked: Tensor
    lengths: tuple[Tensor, Tensor] | None = None
    mask: Mask | None = None
    bias: Tensor | None = None
    table: Tensor | None = None
    rest: Literal["skip", "centroid"] = "skip"
    summary: KVSummary | None = None
    first_order: bool = False
    permutation: Permutation | None = None
    key_blocks: int = 0

    @classmethod
    def of(
        cls,
        visit: Tensor,
        block: tuple[int, int],
        keys: int,
        *,
        full: Tensor | None = None,
        width: int | None = None,
        mask: Mask | None = None,
        lengths: tuple[Tensor, Tensor] | None = None,
        permutation: Permutation | None = None,
        **fields,
    ) -> BlockPlan:
        """The plan that visits the blocks of `visit`.

        Args:
            visit: bool [B or 1, H or 1, NQ, NK]. Blocks in which `mask` hides everything are dropped.
            block: (query, key) block sizes.
            keys: number of key tokens (slots), which decides whether the last block is whole.
            full: blocks that need no masking, as far as the caller knows; by default all, or what `mask` says.
            width: at most this many blocks per query block are kept, so that memory is smaller; None: all of them,
                whatever they are, without reading a count on the host.
            mask, lengths, permutation, **fields: as in the plan. A mask's tensors are padded to whole blocks.
        """
        n_q, n_k = visit.shape[-2:]
        if mask is not None:
            mask = mask.padded(n_q * block[0], n_k * block[1])
            some, every = (x[..., :n_k] for x in mask.blocks(block))
            visit = visit & some
            full = every if full is None else full & every
        if lengths is None:
            whole = (torch.arange(1, n_k + 1, device=visit.device) * block[1] <= keys)[None, None, None]
        else:
            # Keys that are put in order for the call are padded with finite ones, which a full block only hides.
            gathered = permutation is not None and permutation.k_source is not None
            whole = ((lengths[1] >= block[1]) | gathered)[..., None, :]
            visit = visit & (lengths[1] > 0)[..., None, :]
        full = visit & whole if full is None else visit & whole & full
        masked = visit & ~full
        indices, n_full, n_masked = _listed(full, masked, n_k if width is None else min(width, n_k))
        return cls(
            block,
            indices,
            n_full,
            n_masked,
            lengths=lengths,
            mask=mask,
            permutation=permutation,
            key_blocks=n_k,
            **fields,
        )

    @classmethod
    def best(cls, scores: Tensor, count: int, block: tuple[int, int], keys: int, **fields) -> BlockPlan:
        """The plan that visits the `count` best blocks of each row of `scores` [B or 1, H or 1, NQ, NK].

        What `of` makes of the same choice, but by sorting `count` numbers instead of walking all NK.
        """
        n_k = scores.shape[-1]
        count = min(max(1, count), n_k)
        indices = scores.topk(count, dim=-1, sorted=False).indices.to(torch.int32).sort(dim=-1).values
        # Only the last block may reach past the last key, and it stands last.
        n_masked = ((indices[..., -1] == n_k - 1) & (n_k * block[1] > keys)).to(torch.int32)
        return cls(block, indices, count - n_masked, n_masked, key_blocks=n_k, **fields)

    @classmethod
    def dense(cls, queries: int, keys: int, block: tuple[int, int], device: torch.device | str = "cpu") -> BlockPlan:
        """Every block: what plain attention does, by this kernel."""
        shape = (1, 1, -(-queries // block[0]), -(-keys // block[1]))
        return cls.of(torch.ones(shape, dtype=torch.bool, device=device), block, keys)

    @classmethod
    def of_mask(cls, mask: Mask, queries: int, keys: int, block: tuple[int, int], **fields) -> BlockPlan:
        """The blocks in which `mask` shows anything; `mask` speaks of slots, and so do `queries` and `keys`."""
        device = mask.bits.device if hasattr(mask, "bits") else mask.at.device  # type: ignore[union-attr]
        shape = (1, 1, -(-queries // block[0]), -(-keys // block[1]))
        return cls.of(torch.ones(shape, dtype=torch.bool, device=device), block, keys, mask=mask, **fields)

    @property
    def query_blocks(self) -> int:
        return self.indices.shape[2]

    def listed(self, key_blocks: int) -> Tensor:
        """Bool [B or 1, H or 1, NQ, NK]: which blocks are visited."""
        position = torch.arange(self.indices.shape[-1], device=self.indices.device)
        used = position < (self.n_full + self.n_masked)[..., None]
        target = torch.where(used, self.indices.long(), key_blocks)
        out = torch.zeros((*self.indices.shape[:-1], key_blocks + 1), dtype=torch.bool, device=self.indices.device)
        return out.scatter_(-1, target, True)[..., :key_blocks]

    def density(self, key_blocks: int | None = None) -> float:
        """The share of key blocks that is visited. Reads the device: for reports, not for the loop."""
        return float((self.n_full + self.n_masked).double().mean()) / (key_blocks or self.key_blocks)

    def trimmed(self) -> BlockPlan:
        """The same plan with lists no longer than the longest. Reads the device: for plans that are made once."""
        width = max(1, int((self.n_full + self.n_masked).max()))
        return replace(self, indices=self.indices[..., :width].contiguous())


def _listed(full: Tensor, masked: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of block numbers, full ones first, each in rising order, cut at `width`."""
    n_full, n_masked = full.sum(-1, dtype=torch.int32), masked.sum(-1, dtype=torch.int32)
    place = torch.where(full, full.cumsum(-1) - 1, n_full[..., None] + masked.cumsum(-1) - 1)
    place = torch.where(full | masked, place, width).clamp_max(width)
    blocks = torch.arange(full.shape[-1], device=full.device, dtype=torch.int32).expand(full.shape)
    indices = torch.zeros((*full.shape[:-1], width + 1), dtype=torch.int32, device=full.device)
    indices = indices.scatter_(-1, place, blocks)[..., :width].contiguous()
    n_full = n_full.clamp_max(width)
    return indices, n_full, torch.minimum(n_masked, width - n_full)


def _block_means(x: Tensor, block: int) -> Tensor:
    """Mean token of each block, [B, L, H, D] as [B, H, blocks, D]; a last block that is not whole costs no copy."""
    whole = x.shape[1] // block * block
    means = x[:, :whole].unflatten(1, (-1, block)).mean(2, dtype=_wide(x))
    if whole < x.shape[1]:
        means = torch.cat([means, x[:, whole:].mean(1, keepdim=True, dtype=_wide(x))], 1)
    return means.transpose(1, 2).to(x.dtype)


def _valid_blocks(x: Tensor, block: int, place: Tensor | None, count: Tensor) -> Tensor:
    """[B, L, H, D] as [B, H, blocks, block, D] in logical order, zeros where a block holds no token."""
    missing = -x.shape[1] % block
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, block)).permute(0, 3, 1, 2, 4)
    if place is not None:
        x = x.gather(2, place[..., None, None].expand(*x.shape[:2], -1, *x.shape[3:]))
    return x.masked_fill(~_known(count, block)[..., None], 0.0)


def _known(count: Tensor, block: int) -> Tensor:
    """Bool [B or 1, H or 1, blocks, block]: the places that hold a token."""
    return torch.arange(block, device=count.device) < count[..., None]


def _runs_fast(k: Tensor, v: Tensor) -> bool:
    graded = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    usual = k.shape[-1] in (16, 32, 64, 128) and k.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return runs_triton(k) and usual and not graded and k.shape == v.shape and k.numel() > 0


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
