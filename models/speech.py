"""Speech, frame after frame: phonemes become sound while the text is still being written.

Which phoneme sounds when is never learnt by attention: a duration model says how long each one takes, and every frame
is told its own piece of that plan (`SpeechPlan`). The backbone is the house's causal transformer on a grid of one token
per frame; a flow head draws a frame's latents from what the backbone says about it (CALM, arXiv:2509.06926).
Shapes: B rows, P phonemes, T frames, N slots per frame, C latent channels, E width of the phoneme encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ..streaming.kv_cache import KVCache, KVChunk, Window
from .flow_head import FlowHead
from .packed import PackedModelMixin
from .phonemes import PADDING, REACH, TOKENS, pause_distances
from .transformer import CausalTransformer3DModel

LOOK_AHEAD = REACH + 1  # phonemes after the newest one drawn that change how it sounds
SLOT = 0.01  # seconds: the grid of durations


class SpeechPlan(NamedTuple):
    """What sounds in each slot (a hundredth of a second) of each frame.

    Attributes:
        phoneme: int64 [B, T, N], index into the phonemes.
        elapsed: float [B, T, N], how much of the phoneme is over, 0 to 1.
        length: float [B, T, N], the phoneme's whole length in slots.
    """

    phoneme: Tensor
    elapsed: Tensor
    length: Tensor


class PhonemeEncoder(nn.Module):
    """Phonemes in the light of their neighbours (6 each way), of the nearest pauses and of the voice."""

    def __init__(self, dim: int, voices: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, dim, padding_idx=PADDING)
        self.before, self.after = (nn.Embedding(REACH + 1, dim) for _ in range(2))
        self.voice = nn.Embedding(voices, dim)
        self.convolutions = nn.ModuleList(nn.Conv1d(dim, 2 * dim, 5, padding=2) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))

    def forward(self, tokens: Tensor, voice: Tensor) -> Tensor:
        """Tokens int64 [B, P], voice int64 [B], to [B, P, E]."""
        before, after = pause_distances(tokens)
        x = self.embedding(tokens) + self.before(before) + self.after(after) + self.voice(voice)[:, None]
        outside = (tokens == PADDING)[..., None]
        for norm, convolution in zip(self.norms, self.convolutions):
            normal = norm(x).masked_fill(outside, 0.0)
            x = x + F.glu(convolution(normal.transpose(1, 2)), dim=1).transpose(1, 2)
        return x


class SpeechTransformer(PackedModelMixin, ModelMixin, ConfigMixin):
    """Draws the latents of an `AudioCodec` from phonemes.

    Args:
        latent_channels: C, the codec's.
        frame_rate: the codec's, in Hz; 1 / (frame_rate * 0.01) slots make a frame.
        voices: their names.
        phoneme_dim, phoneme_layers: of the phoneme encoder.
        dim, layers, ffn_dim: of the backbone; heads have 64 channels.
        head_dim, head_layers: of the flow head.
        window: frames that the backbone looks back, the newest included.

    Raises:
        ValueError: a width that is no multiple of 64, or frames that are not whole slots.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 64,
        frame_rate: float = 12.5,
        voices: Sequence[str] = ("slt", "rms", "awb", "kal"),
        phoneme_dim: int = 96,
        phoneme_layers: int = 3,
        dim: int = 192,
        layers: int = 4,
        ffn_dim: int = 416,
        head_dim: int = 128,
        head_layers: int = 3,
        window: int = 64,
    ) -> None:
        super().__init__()
        slots = round(1 / (frame_rate * SLOT))
        if dim % 64 or abs(slots * frame_rate * SLOT - 1) > 1e-6:
            raise ValueError(
                f"dim must be a multiple of 64 and a frame a multiple of {SLOT} s, got dim={dim} and {frame_rate} Hz"
            )
        self.phonemes = PhonemeEncoder(phoneme_dim, len(voices), phoneme_layers)
        self.duration = nn.Sequential(
            nn.LayerNorm(phoneme_dim), nn.Linear(phoneme_dim, phoneme_dim), nn.GELU(), nn.Linear(phoneme_dim, 1)
        )
        self.slot = nn.Sequential(nn.Linear(phoneme_dim + 3, 48), nn.GELU())
        self.frame = nn.Sequential(nn.Linear(48 * slots + phoneme_dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.backbone = CausalTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=dim // 64,
            attention_head_dim=64,
            in_channels=latent_channels,
            out_channels=dim,
            text_dim=1,
            freq_dim=32,
            ffn_dim=ffn_dim,
            num_layers=layers,
            action_dim=dim,
            cross_attention_layers=(),
        )
        # There is no prompt to attend to.
        self.backbone.condition_embedder.text_embedder = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        self.head = FlowHead(latent_channels, dim, head_dim, head_layers)

    @property
    def slots(self) -> int:
        """Slots per frame."""
        return round(1 / (self.config["frame_rate"] * SLOT))

    @property
    def window(self) -> Window:
        return Window(self.config["window"])

    def voice_number(self, name: str) -> int:
        """Raises ValueError with the voices there are."""
        voices = list(self.config["voices"])
        if name not in voices:
            raise ValueError(f"voice must be one of {', '.join(voices)}, got {name!r}")
        return voices.index(name)

    def encode_phonemes(self, tokens: Tensor, voice: Tensor) -> Tensor:
        """Tokens [B, P] (see `phonemes`) and voices [B] to [B, P, E]. A phoneme whose next `LOOK_AHEAD` are not there
        yet changes when they come."""
        return self.phonemes(tokens, voice)

    def durations(self, encoded: Tensor, speed: float = 1.0) -> Tensor:
        """Slots that each phoneme takes, float [B, P]; 1 or more."""
        return (self.duration(encoded)[..., 0].exp() / speed).clamp(1, 200)

    def frame_actions(self, encoded: Tensor, plan: SpeechPlan, voice: Tensor) -> Tensor:
        """What each frame is told: [B, T, D]."""
        index = plan.phoneme.flatten(1)[..., None].expand(-1, -1, encoded.shape[-1])
        given = encoded.gather(1, index).unflatten(1, plan.phoneme.shape[1:])
        place = torch.stack([plan.elapsed, plan.elapsed * plan.length / 10, plan.length.clamp_min(1).log()], dim=-1)
        slots = self.slot(torch.cat([given, place.to(given.dtype)], dim=-1)).flatten(2)
        spoken = self.phonemes.voice(voice)[:, None].expand(-1, slots.shape[1], -1)
        return self.frame(torch.cat([slots, spoken.to(slots.dtype)], dim=-1))

    def forward(
        self,
        previous: Tensor,
        sigma: Tensor,
        actions: Tensor,
        cache: KVChunk | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What the backbone says about frames, under which the head draws them: [B, T, D].

        Args:
            previous: [B, C, T], the latents before each frame (0 before the first), themselves noised to `sigma`.
            sigma: [B], the level of noise in them.
            actions: [B, T, D] from `frame_actions`.
            cache: the open chunk of `make_cache`'s cache, for streams; all T at once under `mask` without.
            mask: of `window.mask(T, 1)`, made once by the caller.
        """
        latents = previous[..., None, None]
        texts: list[tuple[Tensor, ...]] = [()] * self.config["layers"]
        window = self.window if cache is None else None  # streams see what the cache holds
        given = {"actions": actions, "text_keys": texts, "window": window, "mask": mask, "cache": cache}
        out = self.backbone(latents, 1000 * sigma, return_dict=False, **given)[0]
        return out.flatten(2).transpose(1, 2)

    def make_cache(self, rows: int = 1) -> KVCache:
        """Memory of `rows` streams, the same however long they run, on the device of the weights."""
        heads = self.config["dim"] // 64
        weight = self.backbone.proj_out.weight
        return KVCache(
            layers=self.config["layers"],
            rows=rows,
            heads=heads,
            head_dim=64,
            tokens_per_frame=1,
            window=self.window,
            device=weight.device,
            dtype=weight.dtype,
        )

    def next_frames(
        self, previous: Tensor, actions: Tensor, cache: KVCache, rows: Sequence[int], sigma: float = 0.0
    ) -> Tensor:
        """The condition [R, D] of the next frame of each stream in `rows`, which then belongs to the context.

        Args:
            previous: [R, C], the frame before (0 at the start), with noise of level `sigma` in it.
            actions: [R, D] of the frame.
        """
        chunk = cache.open(rows, 1)
        level = previous.new_full((len(rows),), sigma)
        out = self(previous[..., None], level, actions[:, None], cache=chunk)
        chunk.commit()
        return out[:, 0]


def make_plan(durations: Tensor, first: int, frames: int, slots: int) -> SpeechPlan:
    """The plan of `frames` frames from frame `first` on, the last phoneme held to the end.

    Args:
        durations: [B, P] in slots, of all phonemes from frame 0 on; whole numbers keep the plan from drifting.
        slots: per frame.
    """
    ends = durations.cumsum(dim=1)
    starts = ends - durations
    place = torch.arange(first * slots, (first + frames) * slots, device=durations.device, dtype=durations.dtype) + 0.5
    place = place.expand(durations.shape[0], -1).contiguous()
    phoneme = torch.searchsorted(ends, place, right=True).clamp_max(durations.shape[1] - 1)
    length = durations.gather(1, phoneme)
    elapsed = ((place - starts.gather(1, phoneme)) / length.clamp_min(1)).clamp(0, 1)
    shape = (frames, slots)
    return SpeechPlan(phoneme.unflatten(1, shape), elapsed.unflatten(1, shape), length.unflatten(1, shape))
