"""Keys and mouse inside a block: Matrix-Game 2's action modules, with memories of their own.

Names, shapes and arithmetic are those of the published code (github.com/SkyworkAI/Matrix-Game, arXiv 2508.13009). The
mouse joins the picture's own tokens and each place of the picture attends to itself over time; the picture attends to
the keys that were pressed. A latent frame hears the `windows_size` x 4 pictures before it.

Shapes: B rows, F latent frames, S tokens of a frame, L = F S, W the model's width, H heads of D channels, P pictures
that a frame hears.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import attend
from ..streaming.kv_cache import KVCache, KVChunk, Rows

if TYPE_CHECKING:
    from .block import Context

EPS = 1e-6  # of the norms of q and k


class Inputs(NamedTuple):
    """What was pressed and moved while the pictures before each frame were shown: [B, F, P, buttons], [B, F, P, 2]."""

    keyboard: Tensor
    mouse: Tensor | None = None


class Norm(nn.Module):
    """The published RMSNorm of q and k, whose weight is stored and never used."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


class ActionModule(nn.Module):
    """Lets a block hear keys and mouse.

    Args (as in the `action_config` of a published model, whose other entries are refused where they matter):
        dim: W.
        keyboard_dim_in, mouse_dim_in: buttons, and axes of the mouse.
        hidden_size: channels of a picture's keys.
        keyboard_hidden_dim, mouse_hidden_dim: H D of the two attentions.
        heads_num: H.
        windows_size: latent frames whose pictures are heard.
        rope_dim_list: channels turned by time come first; the others, for rows and columns, stand still.
        rope_theta: base of the angles.
    """

    def __init__(
        self,
        dim: int,
        *,
        keyboard_dim_in: int = 4,
        mouse_dim_in: int = 2,
        hidden_size: int = 128,
        keyboard_hidden_dim: int = 1024,
        mouse_hidden_dim: int = 1024,
        heads_num: int = 16,
        windows_size: int = 3,
        vae_time_compression_ratio: int = 4,
        qkv_bias: bool = False,
        rope_dim_list: Sequence[int] = (8, 28, 28),
        rope_theta: float = 256.0,
        enable_mouse: bool = True,
        enable_keyboard: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.turned, self.theta = heads_num, rope_dim_list[0], rope_theta
        heard = windows_size * vae_time_compression_ratio
        if enable_mouse:
            wide = mouse_hidden_dim
            self.mouse_mlp = nn.Sequential(
                nn.Linear(mouse_dim_in * heard + dim, wide),
                nn.GELU(approximate="tanh"),
                nn.Linear(wide, wide),
                nn.LayerNorm(wide),
            )
            self.t_qkv = nn.Linear(wide, 3 * wide, bias=qkv_bias)
            self.img_attn_q_norm, self.img_attn_k_norm = Norm(wide // heads_num), Norm(wide // heads_num)
            self.proj_mouse = nn.Linear(wide, dim, bias=qkv_bias)
        if enable_keyboard:
            wide = keyboard_hidden_dim
            self.keyboard_embed = nn.Sequential(
                nn.Linear(keyboard_dim_in, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
            )
            self.key_attn_q_norm, self.key_attn_k_norm = Norm(wide // heads_num), Norm(wide // heads_num)
            self.mouse_attn_q = nn.Linear(dim, wide, bias=qkv_bias)  # the published name; it asks for the keys
            self.keyboard_attn_kv = nn.Linear(hidden_size * heard, 2 * wide, bias=qkv_bias)
            self.proj_keyboard = nn.Linear(wide, dim, bias=qkv_bias)
        self.mouse, self.keyboard = enable_mouse, enable_keyboard

    def forward(self, x: Tensor, layer: int, context: Context) -> Tensor:
        """`x` [B, L, W] having heard `context.inputs`."""
        inputs, frames = context.inputs, context.grid[0]
        if inputs is None:
            raise ValueError("this model hears keys and mouse: give inputs=Inputs(keyboard, mouse)")
        if self.mouse and inputs.mouse is None:
            raise ValueError("this model hears the mouse too: give its movement, zeros where it rests")
        if self.mouse and inputs.mouse is not None:
            x = x + self._watch(x, inputs.mouse, frames, layer, context)
        if self.keyboard:
            x = x + self._listen(x, inputs.keyboard, frames, layer, context)
        return x

    def _watch(self, x: Tensor, mouse: Tensor, frames: int, layer: int, context: Context) -> Tensor:
        """Each place of the picture, with the mouse, attends to itself over time."""
        rows = x.shape[0]
        places = x.unflatten(1, (frames, -1))  # [B, F, S, W]
        moved = mouse.to(x.dtype).flatten(2)[:, :, None].expand(-1, -1, places.shape[2], -1)
        qkv = self.t_qkv(self.mouse_mlp(torch.cat([places, moved], dim=-1)))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(-3)  # [B, F, S, H, D]
        q, k = self._turned(self.img_attn_q_norm(q), context), self._turned(self.img_attn_k_norm(k), context)
        q, k = q.to(v.dtype), k.to(v.dtype)
        mask = context.frame_mask
        if context.cache is not None:
            view = _actions(context.cache).mouse_view(layer, k.flatten(1, 2), v.flatten(1, 2))
            k, v = (part.unflatten(1, (-1, places.shape[2])) for part in (view.k, view.v))
            mask = None if view.mask is None else view.mask[..., :: places.shape[2]]
        if mask is not None and mask.shape[0] > 1:
            mask = mask.repeat_interleave(places.shape[2], 0)
        q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))  # [B S, F or K, H, D]
        out = attend(q, k, v, mask=mask)
        return self.proj_mouse(out.unflatten(0, (rows, -1)).transpose(1, 2).flatten(1, 2).flatten(-2))

    def _listen(self, x: Tensor, keyboard: Tensor, frames: int, layer: int, context: Context) -> Tensor:
        """The picture attends to what was pressed."""
        pressed = self.keyboard_embed(keyboard.to(x.dtype)).flatten(2)
        k, v = self.keyboard_attn_kv(pressed).unflatten(-1, (2, self.heads, -1)).unbind(-3)  # [B, F, H, D]
        q = self.mouse_attn_q(x).unflatten(-1, (self.heads, -1)).unflatten(1, (frames, -1))
        q = self._turned(self.key_attn_q_norm(q), context).to(v.dtype).flatten(1, 2)
        k = self._turned(self.key_attn_k_norm(k)[:, :, None], context).to(v.dtype)[:, :, 0]
        mask = context.frame_mask
        if context.cache is not None:
            k, v, mask = _actions(context.cache).keyboard_view(layer, k, v)
        elif mask is not None:
            mask = mask.repeat_interleave(q.shape[1] // frames, -2)
        return self.proj_keyboard(attend(q, k, v, mask=mask).flatten(-2))

    def _turned(self, x: Tensor, context: Context) -> Tensor:
        """`x` [B, F, S, H, D] with its first channels turned by the frames' positions, in float32."""
        exponents = torch.arange(0, self.turned, 2, device=x.device, dtype=torch.float64) / self.turned
        angles = context.positions.to(torch.float64)[..., None] * self.theta**-exponents  # [B or 1, F, turned / 2]
        cos, sin = (part.float()[:, :, None, None] for part in (angles.cos(), angles.sin()))
        even, odd = x[..., : self.turned].float().unflatten(-1, (-1, 2)).unbind(-1)
        both = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
        return torch.cat([both, x[..., self.turned :].float()], dim=-1)


def _actions(chunk: KVChunk) -> ActionChunk:
    assert isinstance(chunk, ActionChunk), "make_cache gives such models such a cache"
    return chunk


class ActionCache(KVCache):
    """`KVCache` for a model with action modules, which remember keys and mouse as far back as the model sees.

    Args:
        modules: the model's `action_modules`.
        others: as for `KVCache`.
    """

    def __init__(self, *, modules: Mapping[str, Any], **others: Any) -> None:
        super().__init__(**others)
        self.place = {layer: place for place, layer in enumerate(modules["blocks"])}
        heads, whole = modules.get("heads_num", 16), others | {"layers": len(self.place), "position": "absolute"}
        whole = {name: value for name, value in whole.items() if name != "storage"}  # they are small
        self.parts: dict[str, KVCache] = {}
        for name, tokens in (("mouse", others["tokens_per_frame"]), ("keyboard", 1)):
            if modules.get(f"enable_{name}", True):
                shape = {"heads": heads, "head_dim": modules.get(f"{name}_hidden_dim", 1024) // heads}
                self.parts[name] = KVCache(**whole | shape | {"tokens_per_frame": tokens})

    @property
    def bytes(self) -> int:
        """Memory the arena holds, whatever the streams do."""
        return super().bytes + sum(part.bytes for part in self.parts.values())

    def open(self, rows: Sequence[int], num_frames: int | None = None) -> KVChunk:
        for part in self.parts.values():
            part.open(rows, num_frames)
        return super().open(rows, num_frames)

    def _chunk(self, rows: Rows, num_frames: int) -> ActionChunk:
        return ActionChunk(self, rows, num_frames)

    def rollback(self, row: int, num_frames: int) -> None:
        super().rollback(row, num_frames)
        for part in self.parts.values():
            part.rollback(row, num_frames)

    def reset(self, row: int) -> None:
        super().reset(row)
        for part in self.parts.values():
            part.reset(row)

    def snapshot(self, row: int) -> dict[str, Tensor | int]:
        """A copy of one row, with the slots as they lie."""
        saved = super().snapshot(row)
        for name, part in self.parts.items():
            saved |= {f"{name}_{key}": value for key, value in part.snapshot(row).items()}
        return saved

    def restore(self, row: int, saved: Mapping[str, Tensor | int | float | str]) -> None:
        """Put a snapshot into `row`, of this cache or of another of the same shape."""
        for name, part in self.parts.items():
            mine = {key.removeprefix(f"{name}_"): value for key, value in saved.items() if key.startswith(f"{name}_")}
            if not {"k", "v", "sink_k", "count"} <= mine.keys():
                raise ValueError(f"the snapshot holds no memory of the {name}: it is of another model")
            part.restore(row, mine)
        super().restore(row, saved)


class ActionChunk(KVChunk):
    """A chunk whose action modules write and see keys of their own."""

    cache: ActionCache

    def __init__(self, cache: ActionCache, rows: Rows, num_frames: int, recorded: str | None = None) -> None:
        super().__init__(cache, rows, num_frames, recorded)
        self.parts = {name: KVChunk(part, rows, num_frames, recorded) for name, part in cache.parts.items()}

    def for_recording(self, index: Tensor | None = None) -> ActionChunk:
        chunk = super().for_recording(index)
        return ActionChunk(self.cache, chunk.rows, chunk.num_frames, chunk.recorded)

    def mouse_view(self, layer: int, k: Tensor, v: Tensor):
        return self.parts["mouse"].attend_view(self.cache.place[layer], k, v)

    def keyboard_view(self, layer: int, k: Tensor, v: Tensor):
        return self.parts["keyboard"].attend_view(self.cache.place[layer], k, v)

    def advance(self) -> None:
        super().advance()
        for part in self.parts.values():
            part.advance()

    def count(self) -> None:
        super().count()
        for part in self.parts.values():
            part.count()
