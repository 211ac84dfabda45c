"""How a token model makes a picture, told by its config: token after token on a grid, or map after map.

A way knows how many tokens there are, in which steps they are decided, and how they become pixels. `way_of` picks it:

    kind of transformer          tokens                        codec
    two_pass, masked, causal     int64 [B, N]                  VQAutoencoder with one map
      with token_channels        [B, N, C] by a flow head      diffusers' AutoencoderKL (MAR; LINA's attention too)
    scales                       int64 [B, N], all maps        VQAutoencoder with the same maps (VAR, M-VAR)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from ..models.flow_head import FlowHead
from ..models.token_transformer import TokenTransformer
from ..models.vq_codec import VQAutoencoder
from ..samplers import (
    Ask,
    Categorical,
    Draws,
    FlowTokens,
    Level,
    RasterOrder,
    Revealed,
    Scales,
    TokenPlan,
    TokenSampler,
    decoding,
    decoding_levels,
    level_weights,
)
from ..samplers.schedules import check_count
from .image_inputs import PAPER, Canvas, enlarged, open_cells
from .token_networks import network_of, repeated

ORDERS = {"two_pass": ("random", "masked", "raster"), "masked": ("masked", "random", "raster"), "causal": ("raster",)}


class Way(Protocol):
    """What a pipeline asks. `asked` holds `num_inference_steps`, `order`, `guidance_scale` and `temperature`, any of
    them None for what the sampler is configured to."""

    @property
    def size(self) -> int:
        """Pixels a side."""
        ...

    def begin(self, canvas: Canvas | None, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens and which of them, bool [B, N], an image settles."""
        ...

    def plan(self, known: Tensor, refresh: int, **asked: Any) -> TokenPlan:
        """Steps, order, head and guidance. Raises ValueError for what this model cannot do."""
        ...

    def decoding(
        self, tokens: Tensor, known: Tensor, text: Tensor, plan: TokenPlan, draws: Draws, refresh: int
    ) -> Iterator[Revealed]:
        """Every step; `text` [B, S, D], or [2 B, S, D] with guidance."""
        ...

    def pictures(self, tokens: Tensor, known: Tensor, canvas: Canvas | None) -> Tensor:
        """[B, 3, S, S] in [0, 1]: what is decided so far."""
        ...


def way_of(transformer: TokenTransformer, codec: Any, flow_head: FlowHead | None, sampler: TokenSampler) -> Way:
    """The way of these parts.

    Raises:
        ValueError: parts that do not belong together.
    """
    config = transformer.config
    if config["num_classes"] is not None:
        raise ValueError(
            "this transformer is told labels and not words; decode it as docs/images.md shows for published checkpoints"
        )
    if config["kind"] == "scales":
        return ScaleWay(transformer, codec, flow_head, sampler)
    if config["token_channels"] is not None:
        return LatentWay(transformer, codec, flow_head, sampler)
    return GridWay(transformer, codec, flow_head, sampler)


class GridWay:
    """Discrete tokens on one grid, in any order that the transformer can follow."""

    def __init__(
        self, transformer: TokenTransformer, codec: Any, flow_head: FlowHead | None, sampler: TokenSampler
    ) -> None:
        self.transformer, self.codec, self.flow_head, self.sampler = transformer, codec, flow_head, sampler
        self.kind: str = transformer.config["kind"]
        self.check()

    def check(self) -> None:
        """Refuse parts that do not belong together."""
        if self.flow_head is not None:
            raise ValueError("a flow head draws continuous tokens, and this transformer's are discrete; leave it out")
        check_maps(self.transformer, self.codec)

    @property
    def side(self) -> int:
        """Of the last map of tokens."""
        return self.transformer.config["grid"][-1]

    @property
    def size(self) -> int:
        return self.codec.config["sample_size"]

    @property
    def orders(self) -> Sequence[str]:
        """Possible ones, the best first."""
        return ORDERS[self.kind]

    def begin(self, canvas: Canvas | None, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if canvas is None:
            return self.blank(batch, device), torch.zeros(
                batch, self.transformer.tokens, dtype=torch.bool, device=device
            )
        if self.kind == "causal":
            raise ValueError("a causal model cannot draw into a picture; load one of kind two_pass or masked")
        tokens = self.encode(canvas.picture[None].to(device, self.codec.dtype))
        known = ~open_cells(canvas.hole, self.side).to(device)
        return tokens.repeat(batch, *[1] * (tokens.ndim - 1)), known.repeat(batch, 1)

    def blank(self, batch: int, device: torch.device) -> Tensor:
        """No token yet."""
        return torch.zeros(batch, self.transformer.tokens, dtype=torch.int64, device=device)

    def encode(self, pictures: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1] to tokens."""
        return self.codec.encode(pictures)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens to [B, 3, S, S] in [0, 1]."""
        return self.codec.decode(tokens)

    def plan(self, known: Tensor, refresh: int, **asked: Any) -> TokenPlan:
        check_count(refresh, "refresh")
        order: Any = asked.pop("order")
        configured = self.sampler.config["order"]
        if order is None:
            order = configured if configured in self.orders else self.orders[0]
        plan = self.sampler.plan(known.shape[1] - int(known[0].sum()), order=order, **asked)
        if order not in self.orders:
            listed = " or ".join(f'"{name}"' for name in self.orders)
            what = "of continuous tokens " if self.transformer.config["token_channels"] else ""
            raise ValueError(f"a {self.kind} transformer {what}draws in order {listed} alone, got {order!r}")
        return plan

    def decoding(
        self, tokens: Tensor, known: Tensor, text: Tensor, plan: TokenPlan, draws: Draws, refresh: int
    ) -> Iterator[Revealed]:
        network = network_of(self.transformer, text, refresh)
        return decoding(network, tokens, known, draws=draws, **plan._asdict())

    def pictures(self, tokens: Tensor, known: Tensor, canvas: Canvas | None) -> Tensor:
        pictures = self.decode(tokens).float()
        pictures = torch.where(enlarged(known, self.size), pictures, PAPER)
        if canvas is None:
            return pictures
        return torch.where(canvas.hole.to(pictures.device), pictures, canvas.picture.to(pictures.device))


class LatentWay(GridWay):
    """Continuous tokens: the cells of an autoencoder's latents, scaled as its config says."""

    codec: AutoencoderKL

    def check(self) -> None:
        config, head, codec = self.transformer.config, self.flow_head, self.codec
        if head is None:
            raise ValueError("this transformer's tokens are continuous: give flow_head=, which draws them")
        if not isinstance(codec, AutoencoderKL):
            raise ValueError(
                f"continuous tokens are latents of diffusers' AutoencoderKL, got a {type(codec).__name__} as codec"
            )
        channels = (config["token_channels"], head.config["channels"], codec.config["latent_channels"])
        if len(set(channels)) > 1 or head.config["condition_dim"] != config["dim"]:
            widths = head.config["condition_dim"], config["dim"]
            raise ValueError(
                f"transformer, flow head and codec have {channels[0]}, {channels[1]} and {channels[2]} channels a "
                f"token, and the head reads conditions of width {widths[0]}, where the transformer's is {widths[1]}; "
                "load parts that were trained together"
            )

    @property
    def size(self) -> int:
        return self.side * 2 ** (len(self.codec.config["block_out_channels"]) - 1)

    @property
    def orders(self) -> Sequence[str]:
        return [order for order in ORDERS[self.kind] if order != "masked"]  # nobody knows how sure a flow is

    def blank(self, batch: int, device: torch.device) -> Tensor:
        shape = (batch, self.transformer.tokens, self.transformer.config["token_channels"])
        return torch.zeros(shape, device=device, dtype=self.transformer.dtype)

    def encode(self, pictures: Tensor) -> Tensor:
        codec: Any = self.codec
        latents = codec.encode(2 * pictures - 1).latent_dist.mode()
        latents = (latents - (codec.config["shift_factor"] or 0.0)) * codec.config["scaling_factor"]
        return latents.flatten(2).transpose(1, 2).to(self.transformer.dtype)

    def decode(self, tokens: Tensor) -> Tensor:
        codec: Any = self.codec
        latents = tokens.transpose(1, 2).unflatten(2, (self.side, self.side)).to(codec.dtype)
        latents = latents / codec.config["scaling_factor"] + (codec.config["shift_factor"] or 0.0)
        return (codec.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    def plan(self, known: Tensor, refresh: int, **asked: Any) -> TokenPlan:
        plan, flow = super().plan(known, refresh, **asked), self.flow_head
        assert flow is not None, "checked when the pipeline was made"

        def velocity(x: Tensor, sigma: float, condition: Tensor) -> Tensor:
            return flow(x.to(condition.dtype), sigma, condition).float()

        steps, channels = self.sampler.config["flow_steps"], flow.config["channels"]
        assert isinstance(plan.head, Categorical), "what the sampler makes"
        return plan._replace(head=FlowTokens(velocity, channels, steps, plan.head.temperature))


class ScaleWay(GridWay):
    """Maps of discrete tokens, coarse to fine, a step each: every preview is a whole picture."""

    def check(self) -> None:
        super().check()
        read, made = self.transformer.config["token_channels"], self.codec.config["latent_channels"]
        if read != made:
            raise ValueError(
                f"the transformer reads codes of length {read}, the codec's are of length {made}; load parts that were "
                "trained together"
            )

    def begin(self, canvas: Canvas | None, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if canvas is not None:
            raise ValueError("a next-scale model cannot draw into a picture; load one of kind two_pass or masked")
        return super().begin(None, batch, device)

    def plan(self, known: Tensor, refresh: int, **asked: Any) -> TokenPlan:
        sizes = [side * side for side in self.codec.sides]
        steps, order = asked.pop("num_inference_steps"), asked.pop("order")
        if order is not None or steps not in (None, len(sizes)):
            raise ValueError(
                f"a next-scale model draws its {len(sizes)} maps one after the other, a step each; leave out order and "
                f"num_inference_steps, got {order!r} and {steps!r}"
            )
        if check_count(refresh, "refresh") != 1:
            raise ValueError(f"a next-scale model computes no token twice; leave refresh at 1, got {refresh}")
        # The order has no say where a map is decided at once.
        plan = self.sampler.plan(known.shape[1], order="raster", num_inference_steps=1, **asked)
        scale = asked["guidance_scale"] or self.sampler.config["guidance_scale"]
        weights = None if plan.guidance is None else level_weights(scale - 1, len(sizes))
        return TokenPlan(sizes, RasterOrder(), plan.head, weights)

    def decoding(
        self, tokens: Tensor, known: Tensor, text: Tensor, plan: TokenPlan, draws: Draws, refresh: int
    ) -> Iterator[Revealed]:
        transformer, codec, batch = self.transformer, self.codec, tokens.shape[0]
        cache, times = transformer.begin(text), len(text) // batch
        levels = Scales(codec.sides, codec.embed, codec.mend, codec.codebook(), codec.config["latent_channels"])

        def network(level: int, given: Tensor | None, ask: Ask) -> Tensor:
            return transformer.predict_scale(level, None if given is None else repeated(given, times), cache)

        steps = [Level(plan.head)] * len(plan.counts)
        first, places = 0, torch.arange(tokens.shape[1], device=tokens.device).expand(batch, -1)
        for done in decoding_levels(network, levels, steps, batch=batch, draws=draws, guidance=plan.guidance):
            last = first + done.tokens.shape[1]
            tokens = torch.cat([tokens[:, :first], done.tokens, tokens[:, last:]], dim=1)
            yield Revealed(tokens, places < last, places[:, first:last], done.level, len(steps))
            first = last

    def pictures(self, tokens: Tensor, known: Tensor, canvas: Canvas | None) -> Tensor:
        return self.decode(tokens[:, : int(known[0].sum())]).float()


def check_maps(transformer: TokenTransformer, codec: VQAutoencoder) -> None:
    """Refuse a codec whose maps of tokens are others than the transformer's."""
    config = transformer.config
    sides = list(config["scale_sides"] or ([config["grid"][0]] if len(set(config["grid"])) == 1 else []))
    if not isinstance(codec, VQAutoencoder) or list(codec.sides) != sides:
        maps = list(codec.sides) if isinstance(codec, VQAutoencoder) else f"those of a {type(codec).__name__}"
        raise ValueError(
            f"the transformer predicts {transformer.tokens} tokens a picture, but the codec's maps are {maps} a side; "
            "load parts that were trained together"
        )
