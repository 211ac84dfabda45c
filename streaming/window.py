"""Who sees whom in a stream: the one rule behind the training mask and behind the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


@dataclass(frozen=True, slots=True)
class Window:
    """A sliding window with sinks.

    Frames come in blocks of `block`, which see each other whole. A block sees the blocks before it as far as `frames`
    frames reach, counted with the block itself and with the first `sinks` frames of the stream, which stay for ever.
    """

    frames: int
    sinks: int = 0
    block: int = 1

    def __post_init__(self) -> None:
        if self.block < 1 or self.sinks < 0 or self.frames < self.sinks + self.block:
            raise ValueError(
                f"a window needs block >= 1, sinks >= 0 and frames >= sinks + block; got frames={self.frames}, "
                f"sinks={self.sinks}, block={self.block}"
            )

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Bool, broadcast from integer frame indices `query` and `key`: may that query frame see that key frame?"""
        block_end = query - query % self.block + self.block - 1
        recent = key > block_end - (self.frames - self.sinks)
        return (key <= block_end) & (recent | (key < self.sinks))

    def mask(self, num_frames: int, tokens_per_frame: int, device: torch.device | str | None = None) -> Tensor:
        """Bool [L, L] for a whole sequence of `num_frames * tokens_per_frame` tokens."""
        frame = torch.arange(num_frames, device=device).repeat_interleave(tokens_per_frame)
        return self.visible(frame[:, None], frame[None, :])

    def block_mask(self, num_frames: int, tokens_per_frame: int, device: torch.device) -> BlockMask:
        """The same mask for FlexAttention, which skips what it hides."""
        length = num_frames * tokens_per_frame

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return self.visible(query // tokens_per_frame, key // tokens_per_frame)

        return create_block_mask(visible, None, None, length, length, device=device)
