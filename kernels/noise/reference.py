"""Philox4x32-10 in plain PyTorch.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3. Words are unsigned
32-bit numbers held in int64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 10
WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox_words(counter: Tensor, key: Tensor) -> Tensor:
    """The four random words of each counter.

    Args:
        counter: int64 [4, ...], words of the 128-bit counter, lowest first.
        key: int64 [2, ...], words of the 64-bit key, broadcastable against `counter[0]`.

    Returns:
        int64 [4, ...].
    """
    # The product of two words needs 64 unsigned bits. Multiplying by M - 2^32, small and negative, stays inside int64:
    # word * (M - 2^32) = word * M - word * 2^32 has the same low word, and a high word short by `word`.
    even = torch.stack([counter[0], counter[2]])
    odd = torch.stack([counter[3], counter[1]])
    column = (2,) + (1,) * (even.ndim - 1)
    multipliers = torch.tensor([m - 2**32 for m in MULTIPLIERS], device=counter.device).view(column)
    weyl = torch.tensor([[i * w for w in reversed(WEYL)] for i in range(ROUNDS)], device=counter.device)
    round_keys = (key.flip(0) + weyl.view(ROUNDS, *column)).bitwise_and_(WORD)
    for round_key in round_keys.unbind():
        product = even * multipliers
        even = (product >> 32).add_(even).bitwise_xor_(odd).bitwise_xor_(round_key).flip(0)
        odd = product.bitwise_and_(WORD)
    return torch.stack([even[0], odd[1], even[1], odd[0]])


def element_words(seed: Tensor, frame: Tensor, step: int, count: int) -> Tensor:
    """Random words int64 [4, R, ceil(count / 4)]; word j of column i belongs to element 4 * i + j."""
    key = torch.stack([seed & WORD, (seed >> 32) & WORD])
    counter = torch.empty((4, seed.shape[0], -(-count // 4)), dtype=torch.int64, device=seed.device)
    counter[0] = torch.arange(counter.shape[-1], device=seed.device)
    counter[1] = (frame & WORD).unsqueeze(-1)
    counter[2] = ((frame >> 32) & WORD).unsqueeze(-1)
    counter[3] = step
    return philox_words(counter, key.unsqueeze(-1))


def philox_normal_reference(seed: Tensor, frame: Tensor, step: int, count: int) -> Tensor:
    """Standard normal float32 [R, count], by Box and Muller's transform of each pair of words."""
    words = element_words(seed, frame, step, count).double()
    # (word + 0.5) / 2^32 lies inside (0, 1), so the logarithm is finite; the largest value drawn is 6.7.
    radius = words[0::2].add(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = words[1::2].mul(2.0 * math.pi * 2.0**-32)
    normal = torch.stack([angle.cos().mul_(radius), angle.sin_().mul_(radius)], dim=1)
    return _elements(normal.float().flatten(0, 1))[:, :count]


def philox_uniform_reference(seed: Tensor, frame: Tensor, step: int, count: int, bits: int) -> Tensor:
    """Uniform float64 [R, count] in [0, 1), multiples of 2^-bits."""
    words = element_words(seed, frame, step, count) >> (32 - bits)
    return _elements(words.double().mul_(2.0**-bits))[:, :count]


def _elements(words: Tensor) -> Tensor:
    """[4, R, columns] to [R, 4 * columns], the four of a counter side by side."""
    _, rows, columns = words.shape
    return words.permute(1, 2, 0).reshape(rows, 4 * columns)
