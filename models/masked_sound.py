"""Whole clips of residual codes at once: level after level, each from all coarser ones, in a few masked passes.

Shapes: B batch, Q levels, T frames, V codes per level, D width, P frames of a prompt, K conditioning tokens.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .conformer import Conformer
from .level_tokens import LevelTokens, embed_together
from .packed import PackedModelMixin
from .token_layers import Rotary, Stack, Where, axial_angles


class MaskedSoundTransformer(PackedModelMixin, ModelMixin, ConfigMixin):
    """Predicts the codes of one level of a residual quantiser in all frames, from those that are known.

    A frame is one vector: the sum of its codes' embeddings (a mask's where a code is not known) and of the conditioning
    token that it belongs to. The codes of the prompt's frames are known at every level. The defaults are the published
    size but for the number of parameters, which the paper rounds up to 350 M.

    Source: SoundStorm, Borsos et al. 2023 (arXiv:2305.09636), sections 3.1 and 3.2.

    Args:
        levels: Q, of the codec.
        vocab_size: V.
        condition_size: how many conditioning tokens there are (semantic tokens), or None for none.
        condition_frames: frames that one conditioning token lasts.
        dim, num_heads, ffn_dim, num_layers: of the layers.
        kernel: frames that the convolution of a Conformer block sees; None for blocks without convolution.
    """

    @register_to_config
    def __init__(
        self,
        levels: int = 12,
        vocab_size: int = 1024,
        condition_size: int | None = 1024,
        condition_frames: int = 2,
        dim: int = 1024,
        num_heads: int = 16,
        ffn_dim: int = 4096,
        num_layers: int = 12,
        kernel: int | None = 5,
    ) -> None:
        super().__init__()
        self.tokens = LevelTokens(levels, vocab_size, dim)
        self.condition = None if condition_size is None else nn.Embedding(condition_size, dim)
        if kernel is None:
            self.layers = Stack(num_layers, dim, num_heads, ffn_dim)
        else:
            self.layers = Conformer(num_layers, dim, num_heads, ffn_dim, kernel)
        self.norm_out = nn.RMSNorm(dim, eps=1e-6)
        self.heads = nn.ModuleList(nn.Linear(dim, vocab_size, bias=False) for _ in range(levels))

    def rotary(self, frames: int) -> Rotary:
        """Angles of the places of a clip."""
        places = torch.arange(frames, device=self.tokens.masks.device)[:, None]
        return axial_angles(places, self.config["dim"] // self.config["num_heads"])

    def given(self, condition: Tensor | None, frames: int) -> Tensor:
        """What the conditioning tokens tell every frame: [B, T, D], or zeros [1, 1, D] without any.

        Args:
            condition: int64 [B, K], or [B, K, m] where m tokens come at once.

        Raises:
            ValueError: tokens for a model without, none for a model with, or too few for the frames.
        """
        if (condition is None) != (self.condition is None):
            wanted = "none" if self.condition is None else f"int64 [B, {self._tokens_of(frames)}]"
            raise ValueError(f"this model's conditioning tokens must be {wanted}, got {condition}")
        if self.condition is None or condition is None:
            return self.tokens.masks.new_zeros(1, 1, self.config["dim"])
        if condition.ndim not in (2, 3) or condition.shape[1] != self._tokens_of(frames):
            raise ValueError(
                f"{frames} frames need conditioning tokens [B, {self._tokens_of(frames)}], got {list(condition.shape)}"
            )
        embedded = embed_together(self.condition, condition)
        return embedded.repeat_interleave(self.config["condition_frames"], dim=1)[:, :frames]

    def _tokens_of(self, frames: int) -> int:
        return -(-frames // self.config["condition_frames"])

    def finer(self, level: int, prompt: Tensor | None, frames: int) -> Tensor:
        """What stands for the levels after `level`: masks, but the prompt's codes [B, Q, P] in its frames.

        Returns:
            [1, 1, D] or, with a prompt, [B, T, D].
        """
        masks = self.tokens.masks[level + 1 :].sum(dim=0).expand(1, 1, -1)
        if prompt is None:
            return masks
        batch, _, kept = prompt.shape
        known = self.tokens.total(prompt[:, level + 1 :], level + 1)
        return torch.cat([known, masks.expand(batch, frames - kept, -1)], dim=1)

    def predict(self, level: int, x: Tensor, rotary: Rotary, targets: Tensor | None = None) -> Tensor:
        """Logits [B, n, V] of a level at `targets` int64 [B, n] (None: all frames) from frames' vectors [B, T, D]."""
        x = self.layers(x, Where(rotary))
        if targets is not None:
            x = x.gather(1, targets[..., None].expand(-1, -1, x.shape[2]))
        return self.heads[level](self.norm_out(x))

    def forward(
        self, codes: Tensor, known: Tensor, level: int, condition: Tensor | None = None, prompt: int = 0
    ) -> Tensor:
        """What training needs: the logits [B, T, V] of one level.

        Args:
            codes: int64 [B, Q, T]; those of `level` are looked at where `known`, those of finer ones in the prompt.
            known: bool [B, T].
            level: whose codes are predicted, from 0.
            condition: int64 [B, K] or [B, K, m].
            prompt: P, frames from the start of which every level is known.
        """
        frames = codes.shape[2]
        x = self.tokens.total(codes[:, :level]) + self.tokens.shown(level, codes[:, level], known)
        x = x + self.finer(level, codes[:, :, :prompt] if prompt else None, frames) + self.given(condition, frames)
        return self.predict(level, x, self.rotary(frames))
