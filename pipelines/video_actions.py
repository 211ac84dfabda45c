"""Video models that are played: what a picture, keys and the mouse are to Matrix-Game 2.

Such a model reads no words. It sees the picture that its world begins with, twice: as CLIP sees it, in the place of a
prompt, and as latents beside the noise, followed by grey for all frames to come. Keys and mouse reach its action
modules (`models.actions`) as the pictures before each latent frame.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModel

from ..models.actions import Inputs
from ..models.stream_codec import PICTURES_PER_LATENT
from ..models.wan_vae import AutoencoderKLWan, WanEncoder
from ..streaming import VideoControl
from ..streaming.kv_cache import KVChunk
from ..streaming.types import GameControl
from .video_prompts import PromptReader
from .video_state import VideoState

GREY = 32  # latent frames of the picture and the grey behind it; Wan's codec sees 28 back, so the last ones are alike
HEARD = 12  # pictures that a latent frame hears: three times four
MASKS = 4  # channels that say where the picture is
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CAMERA = 0.1  # what a held arrow key turns, as published
PIXELS = 40.0  # of mouse movement in one chunk that turn as far
# What each published model's buttons are, by their number; None is pressed while nothing else is.
BUTTONS: dict[int, tuple[str | None, ...]] = {
    4: ("KeyW", "KeyS", "KeyA", "KeyD"),
    2: ("KeyW", "KeyS"),
    7: (None, "KeyW", "KeyS", "KeyZ", "KeyC", "KeyA", "KeyD"),
}
TURNS = {"ArrowUp": (1, 0), "ArrowDown": (-1, 0), "ArrowLeft": (0, -1), "ArrowRight": (0, 1)}
DRIVING = {"KeyA": (0, -1), "KeyD": (0, 1)}  # where there are two buttons, these turn


class Heard(NamedTuple):
    """What a pass is given besides the noise: the picture's channels [1, 4 + z, F, h, w], keys and mouse."""

    scene: Tensor
    inputs: Inputs


class GameReader(PromptReader):
    """The part of a video pipeline that reads a picture, keys and mouse instead of words."""

    image_encoder: CLIPVisionModel | None
    vae: AutoencoderKLWan
    _encoder: WanEncoder
    size: Any

    @property
    def is_game(self) -> bool:
        """Is this model played, with keys and mouse?"""
        return bool(self.transformer.config["action_modules"])

    @property
    def buttons(self) -> tuple[str | None, ...]:
        """Which key (W3C code) presses each of the model's buttons."""
        count = self.transformer.config["action_modules"].get("keyboard_dim_in", 4)
        return BUTTONS.get(count, tuple(f"Digit{number}" for number in range(1, count + 1)))

    @property
    def prompt_length(self) -> int:
        """Tokens of a prompt: of words, or of a picture as CLIP sees it."""
        if not self.is_game:
            return self.text_length
        if self.image_encoder is None:
            return 257  # of CLIP ViT-H, which all published models have
        config: Any = self.image_encoder.config
        return (config.image_size // config.patch_size) ** 2 + 1

    def known_prompt(self) -> str:
        return "" if self.is_game else super().known_prompt()

    def nothing_seen(self) -> tuple[Tensor, Tensor]:
        """What `see` makes of no picture: all zero."""
        config, (height, width) = self.transformer.config, self.size
        channels, pixels = self.vae.config["z_dim"], self.vae.config["scale_factor_spatial"]
        scene = torch.zeros(channels, GREY, height // pixels, width // pixels, device=self.transformer.device)
        return torch.zeros(self.prompt_length, config["image_dim"]), scene

    @property
    def keys(self) -> frozenset[str]:
        """Keys (W3C codes) that press or turn something here."""
        named = {*self.buttons, *TURNS, *(DRIVING if len(self.buttons) == 2 else ())}
        return frozenset(key for key in named if key is not None)

    def check_game(self, control: VideoControl) -> None:
        """ValueError for keys that press nothing here."""
        unknown = sorted(getattr(control, "keys", frozenset()) - self.keys)
        if unknown:
            keys = ", ".join(sorted(self.keys))
            raise ValueError(f"unknown key {', '.join(unknown)}; the keys of this world are {keys}")

    def action(self, control: VideoControl) -> Tensor:
        """What is pressed, then how the camera turns (up, right): float32 [buttons + 2]."""
        held = getattr(control, "keys", frozenset())
        right, down = getattr(control, "mouse", (0.0, 0.0))
        pressed = [float(key in held) for key in self.buttons]
        if self.buttons[0] is None:
            pressed[0] = float(not any(pressed))
        turns = TURNS | (DRIVING if len(self.buttons) == 2 else {})
        keyed = [sum(turn[axis] for key, turn in turns.items() if key in held) for axis in (0, 1)]
        moved = (keyed[0] - down / PIXELS, keyed[1] + right / PIXELS)
        return torch.tensor([*pressed, *(CAMERA * max(-1.0, min(1.0, each)) for each in moved)])

    def hear(self, state: VideoState, control: VideoControl) -> None:
        """Let the next chunk be drawn under what `control` holds."""
        if state.scene is None:
            raise ValueError("a world of this model begins with a picture: give image=")
        now = self.action(control)
        state.pressed = torch.stack([now if state.pressed is None else state.pressed[1], now])

    @torch.no_grad()
    def see(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """What a picture [3, H, W] in [0, 1] is to the model: its tokens [N, D], and latents [z, 32, h, w]."""
        if self.image_encoder is None:
            raise ValueError("there is no image encoder to see the picture with; load the model with its image_encoder")
        config: Any = self.image_encoder.config
        device, side = self.transformer.device, config.image_size
        # As Wan shows pictures to CLIP: all of it, pressed into a square.
        square = F.interpolate(picture.cpu()[None], (side, side), mode="bicubic")
        mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        pixels = ((square - mean) / std).to(self.image_encoder.device, self.image_encoder.dtype)
        seen = self.image_encoder(pixels, output_hidden_states=True)
        state = self._encoder.begin(*self.size)
        # A picture in [-1, 1] is followed by zeros, which are grey.
        grey = torch.full((1, PICTURES_PER_LATENT, *picture.shape), 0.5, device=device)
        parts = [self._encoder.encode(picture.to(device)[None, None], state)]
        parts += [self._encoder.encode(grey, state) for _ in range(GREY - 1)]
        return seen.hidden_states[-2][0].cpu(), torch.cat(parts, dim=2)[0].float()

    def heard(self, state: VideoState, first: int, count: int) -> list[Tensor]:
        """What passes over `count` frames from `first` on are given, as tensors that a recording takes; or nothing."""
        if not self.is_game:
            return []
        assert state.scene is not None
        assert state.pressed is not None
        at = torch.arange(first, first + count)
        scene = state.scene[:, at.clamp_max(GREY - 1)]
        mask = torch.zeros(MASKS, *scene.shape[1:], device=scene.device)
        if first == 0:
            mask[:, 0] = 1
        pictures = (PICTURES_PER_LATENT * at[:, None] + torch.arange(-HEARD, 0)).clamp_min(0)
        new = pictures >= max(0, PICTURES_PER_LATENT * first - 3)  # those that this chunk draws
        return [torch.cat([mask, scene])[None], state.pressed[new.long()][None]]

    def taken(self, chunk: KVChunk, given: list[Tensor] | tuple[Tensor, ...]) -> None:
        """Keep what `heard` said for the passes over `chunk`."""
        if given:
            scene, pressed = given
            modules = self.transformer.config["action_modules"]
            mouse = pressed[..., -2:] if modules.get("enable_mouse", True) else None
            chunk.memo[Heard] = Heard(scene, Inputs(pressed[..., :-2], mouse))

    def beside(self, latents: Tensor, chunk: KVChunk) -> tuple[Tensor, dict[str, Any]]:
        """Latents with the picture's channels, and what else the network is given."""
        heard: Heard | None = chunk.memo.get(Heard)
        if heard is None:
            return latents, {}
        return torch.cat([latents, heard.scene.to(latents)], dim=1), {"inputs": heard.inputs}


def new_control(game: bool, prompt: str, strength: float) -> VideoControl:
    """What a stream is steered by."""
    return (GameControl if game else VideoControl)(prompt, strength=strength)
