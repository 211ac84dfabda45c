"""The token sampler a pipeline stores as its `scheduler`: counts, order and head, chosen by a small configuration."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, NamedTuple, get_args

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .counts import Curve, curve_counts, even_counts, share_counts
from .heads import Categorical
from .orders import Confidence, RandomOrder, RasterOrder
from .schedules import check_count
from .tokens import Head, Order, revealed_weights

OrderName = Literal["random", "masked", "raster"]


class TokenPlan(NamedTuple):
    """What `tokens.decoding` takes; `guidance` is None where there is none."""

    counts: list[int]
    order: Order
    head: Head
    guidance: list[float] | None


class TokenSampler(SchedulerMixin, ConfigMixin):
    """Decides tokens. Has no state: one sampler serves any number of pictures.

    Args:
        num_inference_steps: default number of steps; for order "raster" None means one token at a time.
        order: "random" (ARPG: a random permutation, many tokens at once), "masked" (MaskGIT: the surest first) or
            "raster" (from the first place to the last).
        guidance_scale: classifier-free guidance, reached as the share of decided tokens grows; 1 is none.
        temperature, top_k, top_p: of the tokens, see `Categorical`.
        choice_temperature: of the order "masked", see `Confidence`.
        curve: of the order "random", see `curve_counts`; "cosine" leaves less to the last step than "arccos".
        flow_steps: of continuous tokens, see `FlowTokens`.

    Raises:
        ValueError: any of them out of range.
    """

    @register_to_config
    def __init__(
        self,
        num_inference_steps: int | None = 16,
        order: OrderName = "random",
        guidance_scale: float = 3.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        choice_temperature: float = 4.5,
        curve: Curve = "arccos",
        flow_steps: int = 25,
    ) -> None:
        Categorical(temperature, top_k, top_p)
        curve_counts(1, 1, curve)
        check_order(order)
        check_scale(guidance_scale)
        check_count(flow_steps, "flow_steps")
        if num_inference_steps is not None:
            check_count(num_inference_steps, "num_inference_steps")

    def plan(
        self,
        open_tokens: int,
        *,
        num_inference_steps: int | None = None,
        order: OrderName | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
    ) -> TokenPlan:
        """How to decide `open_tokens` of them; what is not given is as configured.

        More steps than open tokens are cut to one token each, so that a small hole can be filled with any setting.

        Raises:
            ValueError: an argument out of range.
        """
        config = self.config
        name = check_order(config["order"] if order is None else order)
        scale = check_scale(config["guidance_scale"] if guidance_scale is None else guidance_scale)
        configured = None if name == "raster" and config["order"] != "raster" else config["num_inference_steps"]
        steps = configured if num_inference_steps is None else num_inference_steps
        steps = open_tokens if steps is None else min(check_count(steps, "num_inference_steps"), open_tokens)
        orders = {
            "random": RandomOrder(),
            "masked": Confidence(config["choice_temperature"]),
            "raster": RasterOrder(),
        }
        curved = partial(curve_counts, curve=config["curve"])
        schedule = {"random": curved, "masked": share_counts, "raster": even_counts}[name]
        counts = schedule(open_tokens, steps) if open_tokens else []
        degree = config["temperature"] if temperature is None else temperature
        head = Categorical(degree, config["top_k"], config["top_p"])
        return TokenPlan(counts, orders[name], head, None if scale == 1 else revealed_weights(counts, scale))


def check_order(order: str) -> str:
    if order not in get_args(OrderName):
        raise ValueError(f"order must be one of {', '.join(get_args(OrderName))}, got {order!r}")
    return order


def check_scale(scale: float) -> float:
    if not (math.isfinite(scale) and scale >= 1):
        raise ValueError(f"guidance_scale must be at least 1 (no guidance) and finite, got {scale}")
    return scale
