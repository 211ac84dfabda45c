"""The networks of diffusers' image pipelines behind one call: scaled latents, timesteps and conditions of any rows.

A condition is a tuple of tensors with a leading axis of one row. It is made once per prompt, not once per step. Rows of
different prompts are joined along that axis.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor

from .live_text_keys import TextKeys

Condition = tuple[Tensor, ...]
Told = tuple[Condition, Condition | None]  # positive and, for networks that are asked twice, negative


class LiveNetwork:
    """One family of pipelines.

    Attributes:
        rounds_up: as diffusers counts the steps of a strength; see `read_levels`.
        part: the name of the network among the pipeline's parts.
        patch: latents a side that are one token.
        guidance: the scale that is taken if none is given.
        module: the network itself.
        dtype: what it computes in, as of the last `settle`.
    """

    rounds_up: ClassVar[bool] = True
    part: ClassVar[str] = "transformer"
    patch: ClassVar[int] = 1

    def __init__(self, pipe: Any, size: tuple[int, int]) -> None:
        self.pipe, self.size = pipe, size
        self.settle()

    def settle(self) -> None:
        """Look at weights that may have been converted."""
        self.dtype: torch.dtype = self.module.dtype

    @property
    def module(self) -> Any:
        return getattr(self.pipe, self.part)

    @property
    def device(self) -> torch.device:
        """Asked often: diffusers' own `device` looks through all modules, which takes milliseconds."""
        return next(self.module.parameters()).device

    @property
    def reads_guidance(self) -> bool:
        """Whether the network itself is told how strongly to follow the prompt."""
        return bool(self.module.config.get("guidance_embeds"))

    @property
    def guidance(self) -> float:
        return 1.0

    @property
    def tokens(self) -> int:
        """What a picture is to the network, for schedules that depend on it."""
        return (self.size[0] // 16) * (self.size[1] // 16)

    def read(self, prompt: str, negative: str | None, guidance: float) -> Told:
        """The conditions of a prompt and, if it is not None, of the negative one."""
        raise NotImplementedError

    def __call__(self, x: Tensor, timestep: Tensor, condition: Sequence[Tensor]) -> Tensor:
        """The network's output, of the shape of x [B, C, h, w]; timestep [B]."""
        raise NotImplementedError

    def join_projections(self) -> None:
        """Make the projections to queries, keys and values one, where that is the network's habit."""

    def _scale(self, guidance: float) -> Tensor:
        return torch.full((1,), guidance, device=self.device, dtype=torch.float32)


class UNet(LiveNetwork):
    """Stable Diffusion 1 and 2, their Turbo and LCM versions."""

    rounds_up = False
    part = "unet"

    def __init__(self, pipe: Any, size: tuple[int, int]) -> None:
        super().__init__(pipe, size)
        self._keys = TextKeys.of(self.module)

    def join_projections(self) -> None:
        for name, layer in self.module.named_modules():
            if name.endswith(".attn1") and type(layer.processor) is AttnProcessor2_0:
                layer.fuse_projections()
                layer.set_processor(FusedAttnProcessor2_0())

    def _kept(self, text: Tensor) -> Tensor:
        """What the network attends to: the keys and values of all its layers, if they can be kept."""
        return text if self._keys is None else self._keys.read(text.to(self.module.dtype))

    @property
    def reads_guidance(self) -> bool:
        return self.module.config.time_cond_proj_dim is not None

    @property
    def guidance(self) -> float:
        return 8.5 if self.reads_guidance else 1.0

    def read(self, prompt: str, negative: str | None, guidance: float) -> Told:
        text, silence = self.pipe.encode_prompt(prompt, self.device, 1, negative is not None, negative)
        told = self._told(guidance)
        return (self._kept(text), *told), None if negative is None else (self._kept(silence), *told)

    def _told(self, guidance: float) -> Condition:
        if not self.reads_guidance:
            return ()
        wide = self.module.config.time_cond_proj_dim
        return (self.pipe.get_guidance_scale_embedding(self._scale(guidance - 1).cpu(), wide).to(self.device),)

    def __call__(self, x: Tensor, timestep: Tensor, condition: Sequence[Tensor]) -> Tensor:
        told = condition[1].to(x.dtype) if self.reads_guidance else None
        return self.module(x, timestep, condition[0], timestep_cond=told, return_dict=False)[0]


class LargeUNet(UNet):
    """SDXL, its Turbo and LCM versions."""

    def read(self, prompt: str, negative: str | None, guidance: float) -> Told:
        device, told = self.device, self._told(guidance)
        text, silence, pooled, pooled_silence = self.pipe.encode_prompt(
            prompt,
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=negative is not None,
            negative_prompt=negative,
        )
        scores = self.pipe.config.get("requires_aesthetics_score", False)

        def measures(score: float) -> Tensor:
            ids = [*self.size, 0, 0, *((score,) if scores else self.size)]
            return torch.tensor([ids], device=device, dtype=text.dtype)

        positive = (self._kept(text), pooled, measures(6.0), *told)
        if negative is None:
            return positive, None
        return positive, (self._kept(silence), pooled_silence, measures(2.5), *told)

    def __call__(self, x: Tensor, timestep: Tensor, condition: Sequence[Tensor]) -> Tensor:
        text, pooled, measures, *told = condition
        return self.module(
            x,
            timestep,
            text,
            timestep_cond=told[0].to(x.dtype) if told else None,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": measures},
            return_dict=False,
        )[0]


class Flux(LiveNetwork):
    """FLUX: latents packed two by two into tokens."""

    patch = 2

    @property
    def guidance(self) -> float:
        return 3.5 if self.reads_guidance else 1.0

    def read(self, prompt: str, negative: str | None, guidance: float) -> Told:
        def one(words: str) -> Condition:
            text, pooled, _ = self.pipe.encode_prompt(words, None, device=self.device)
            return text, pooled, self._scale(guidance)

        return one(prompt), None if negative is None else one(negative)

    def __call__(self, x: Tensor, timestep: Tensor, condition: Sequence[Tensor]) -> Tensor:
        text, pooled, guidance = condition
        rows, channels, height, width = x.shape
        # [B, C, h, 2, w, 2] -> [B, h w, C 2 2]
        packed = x.view(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        place = torch.zeros(height // 2, width // 2, 3, device=x.device, dtype=x.dtype)
        place[..., 1] += torch.arange(height // 2, device=x.device)[:, None]
        place[..., 2] += torch.arange(width // 2, device=x.device)
        (out,) = self.module(
            hidden_states=packed.reshape(rows, -1, channels * 4),
            timestep=timestep / 1000,
            guidance=guidance if self.reads_guidance else None,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=place.flatten(0, 1),
            return_dict=False,
        )
        unpacked = out.view(rows, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return unpacked.reshape(x.shape)


class StableDiffusion3(LiveNetwork):
    """SD3 and 3.5."""

    patch = 2

    def read(self, prompt: str, negative: str | None, guidance: float) -> Told:
        text, silence, pooled, pooled_silence = self.pipe.encode_prompt(
            prompt,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=negative is not None,
            negative_prompt=negative,
        )
        return (text, pooled), None if negative is None else (silence, pooled_silence)

    def __call__(self, x: Tensor, timestep: Tensor, condition: Sequence[Tensor]) -> Tensor:
        text, pooled = condition
        return self.module(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0]


class SanaSprint(LiveNetwork):
    """SANA-Sprint, whose network is one of flow matching under a change of time; see `live_levels`."""

    @property
    def reads_guidance(self) -> bool:
        return True

    @property
    def guidance(self) -> float:
        return 4.5

    def read(self, prompt: str, negative: str | None, guidance: float) -> Told:
        # What the plain call puts before every prompt.
        advice = inspect.signature(type(self.pipe).__call__).parameters["complex_human_instruction"].default

        def one(words: str) -> Condition:
            text, mask = self.pipe.encode_prompt(words, device=self.device, complex_human_instruction=advice)
            return text, mask, self._scale(guidance * self.module.config.guidance_embeds_scale)

        return one(prompt), None if negative is None else one(negative)

    def __call__(self, x: Tensor, timestep: Tensor, condition: Sequence[Tensor]) -> Tensor:
        text, mask, guidance = condition
        return self.module(
            x,
            encoder_hidden_states=text.to(x.dtype),
            encoder_attention_mask=mask,
            guidance=guidance.to(x.dtype),
            timestep=timestep,
            return_dict=False,
        )[0]


FAMILIES: Mapping[str, type[LiveNetwork]] = {
    "FluxTransformer2DModel": Flux,
    "SD3Transformer2DModel": StableDiffusion3,
    "SanaTransformer2DModel": SanaSprint,
}
SUPPORTED = "Stable Diffusion 1, 2, XL and 3, their Turbo and LCM versions, FLUX and SANA-Sprint"


def network_of(pipe: Any, size: tuple[int, int]) -> LiveNetwork:
    """The family of a diffusers pipeline, by its parts.

    Raises:
        ValueError: parts are missing, or of a kind that is not known here.
    """
    name, parts = type(pipe).__name__, getattr(pipe, "components", {})
    network = parts.get("unet") if parts.get("unet") is not None else parts.get("transformer")
    kind = type(network).__name__
    if kind == "UNet2DConditionModel":
        # SDXL's network is the one that is told sizes beside the words.
        family = LargeUNet if cast("Any", network).config.addition_embed_type == "text_time" else UNet
    elif kind in FAMILIES:
        family = FAMILIES[kind]
    else:
        raise ValueError(f"a live image pipeline can be made of {SUPPORTED}; {name} has no network of these ({kind})")
    if family is SanaSprint and type(parts.get("scheduler")).__name__ != "SCMScheduler":
        raise ValueError(
            f"of the SANA family the live pipeline runs SANA-Sprint, whose scheduler is SCM; {name}'s is not"
        )
    for part in ("vae", "scheduler"):
        if parts.get(part) is None:
            raise ValueError(
                f"this {name} has no {part}; a live image pipeline can be made of whole pipelines of {SUPPORTED}"
            )
    if parts.get("controlnet") is not None or not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"a live image pipeline knows of prompts and pictures alone; a {name} wants something else")
    return family(pipe, size)


def check_codec(network: LiveNetwork, vae: Any) -> None:
    """Refuse an autoencoder whose latents the network does not read.

    Raises:
        ValueError: with the numbers of channels.
    """
    latents, wanted = vae.config.latent_channels, network.module.config.in_channels
    if network.part == "unet" and latents != wanted:
        raise ValueError(
            f"this UNet reads {wanted} channels and the autoencoder's latents have {latents}; take the autoencoder of "
            "the same family, and no model for inpainting"
        )
