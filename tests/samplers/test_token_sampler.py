"""The configuration a pipeline stores: what it plans, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from millstream.samplers import TokenSampler
from millstream.samplers.orders import Confidence, RandomOrder, RasterOrder


def test_each_order_plans_its_own_counts() -> None:
    sampler = TokenSampler(num_inference_steps=8)
    plan = sampler.plan(64)
    assert isinstance(plan.order, RandomOrder)
    assert (len(plan.counts), sum(plan.counts)) == (8, 64)
    assert isinstance(sampler.plan(64, order="masked").order, Confidence)
    raster = sampler.plan(64, order="raster")
    assert isinstance(raster.order, RasterOrder)
    assert raster.counts == [1] * 64
    assert len(sampler.plan(64, order="raster", num_inference_steps=16).counts) == 16


def test_guidance_starts_at_none_and_grows() -> None:
    weights = TokenSampler(guidance_scale=4.0, num_inference_steps=5).plan(10).guidance
    assert weights is not None
    assert weights[0] == 1
    assert weights == sorted(weights)
    assert weights[-1] < 4
    assert TokenSampler(guidance_scale=1.0).plan(10).guidance is None


def test_the_curve_is_of_the_random_order() -> None:
    early, late = (TokenSampler(8, curve=curve).plan(256).counts for curve in ("cosine", "arccos"))
    assert early[-1] < late[-1]
    assert TokenSampler(8, curve="cosine").plan(256, order="raster", num_inference_steps=8).counts == [32] * 8


def test_a_small_hole_takes_fewer_steps_and_none_no_step() -> None:
    assert TokenSampler(num_inference_steps=16).plan(3).counts == [1, 1, 1]
    assert TokenSampler().plan(0).counts == []


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    TokenSampler(order="masked", top_k=7, guidance_scale=2.0).save_pretrained(tmp_path)
    loaded = TokenSampler.from_pretrained(tmp_path)
    assert (loaded.config["order"], loaded.config["top_k"], loaded.plan(9).head.top_k) == ("masked", 7, 7)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="order must be one of random, masked, raster, got 'spiral'"):
        TokenSampler(order="spiral")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="guidance_scale must be at least 1"):
        TokenSampler().plan(4, guidance_scale=0.5)
    with pytest.raises(ValueError, match="num_inference_steps must be a whole number of at least 1, got 0"):
        TokenSampler().plan(4, num_inference_steps=0)
    with pytest.raises(ValueError, match="curve must be one of arccos, cosine, linear, got 'flat'"):
        TokenSampler(curve="flat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        TokenSampler(temperature=-1)
    for name in ("guidance_scale", "temperature"):
        for value in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{name} must be at least [01].* and finite, got {value}"):
                TokenSampler().plan(4, **{name: value})  # type: ignore[arg-type]
