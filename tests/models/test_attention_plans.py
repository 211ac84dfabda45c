"""Attention by name in a model's config: over a sequence, under a causal window, and over a stream."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from millstream import Session
from millstream.models.attention_plans import NamedAttention
from millstream.models.transformer import CausalTransformer3DModel
from millstream.streaming.kv_cache import KVCache, Window
from millstream.streaming.types import WorldControl

GRID = (5, 4, 6)  # frames, rows and columns of tokens
EVERYTHING = (
    "window(9, 9, 9)", "pisa(density=1.0)", "svg_ear(density=1.0)", "moba(moba_topk=99)", "sparge(simthreshd1=2.0)",
    "proxy(gamma=1.1)", "svg2(num_q_clusters=2, num_k_clusters=2, top_p=1.1)", "sliding_tile(9, 9, 9)",
    "radial(decay_factor=99)", "vmoba(simsum_threshold=1.1)", "biformer(topk=99)", "svg1(sparsity=2.0)",
)  # fmt: skip
STREAMED = EVERYTHING[:7]


def model(attention: str | None = None) -> CausalTransformer3DModel:
    torch.manual_seed(0)
    transformer = CausalTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=40, num_layers=2, attention=attention,
    ).eval()  # fmt: skip
    for block in transformer.blocks:
        block.attn1.to_out[0].weight.data *= 8  # so that what is seen matters
    return transformer


def given(frames: int = GRID[0]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, frames, 2 * GRID[1], 2 * GRID[2], generator=generator)
    return latents, torch.full((1,), 400.0), torch.randn(1, 3, 16, generator=generator)


def seen(kernel: tuple[int, int, int], window: Window | None, frames: int = GRID[0]) -> torch.Tensor:
    """Token by token, bool [L, L]: a window of rows and columns pushed inwards at the borders, and of frames."""
    grid = (frames, *GRID[1:])
    places = list(product(*(range(n) for n in grid)))
    mask = torch.zeros(len(places), len(places), dtype=torch.bool)

    def near(a: int, b: int, size: int, n: int) -> bool:
        size = min(size, n)
        first = min(max(a - size // 2, 0), n - size)
        return first <= b < first + size

    for i, q in enumerate(places):
        for j, k in enumerate(places):
            beside = near(q[1], k[1], kernel[1], grid[1]) and near(q[2], k[2], kernel[2], grid[2])
            if window is None:
                mask[i, j] = beside and near(q[0], k[0], kernel[0], grid[0])
                continue
            end = q[0] // window.block * window.block + window.block - 1
            reach = min(kernel[0], window.frames - window.sinks)
            mask[i, j] = k[0] <= end and (k[0] < window.sinks or (beside and k[0] > end - reach))
    return mask


@pytest.mark.parametrize("attention", EVERYTHING)
@torch.no_grad()
def test_a_plan_of_everything_is_dense_attention(attention):
    torch.testing.assert_close(
        model(attention)(*given()).sample, model()(*given()).sample, atol=2e-5, rtol=1e-4
    )  # fmt: skip


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 9, 9), (9, 1, 2)])
@torch.no_grad()
def test_a_window_by_name_is_the_mask_of_the_rule(kernel):
    out = model(f"window{kernel}")(*given()).sample
    truth = model()(*given(), mask=seen(kernel, None)[None, None]).sample
    torch.testing.assert_close(out, truth, atol=2e-5, rtol=1e-4)
    assert (out - model()(*given()).sample).abs().max() > 1e-3, "the window hides nothing that matters"


@torch.no_grad()
def test_names_without_numbers_are_windows_per_layer():
    first, second = model("spatial"), model("temporal")
    for named, kernel in ((first, (1, 9, 9)), (second, (9, 1, 1))):
        truth = model()(*given(), mask=seen(kernel, None)[None, None]).sample
        torch.testing.assert_close(named(*given()).sample, truth, atol=2e-5, rtol=1e-4)
    assert NamedAttention.parse("interleaved")._kernel(0) == first._attention._kernel(0)
    assert NamedAttention.parse("interleaved")._kernel(1) == second._attention._kernel(1)


def stream(transformer: CausalTransformer3DModel, window: Window, latents: torch.Tensor, text, spare=0) -> torch.Tensor:
    config = transformer.config
    cache = KVCache(
        layers=config["num_layers"], rows=1, heads=2, head_dim=16, tokens_per_frame=GRID[1] * GRID[2], window=window,
        spare=spare,
    )  # fmt: skip
    keys, parts = transformer.embed_text(text), []
    for part in latents.split(window.block, 2):
        chunk = cache.open([0], window.block)
        transformer(part + 1, torch.tensor([700.0]), text_keys=keys, cache=chunk)
        parts.append(transformer(part, torch.tensor([400.0]), text_keys=keys, cache=chunk).sample)
        chunk.commit()
    return torch.cat(parts, 2)


@pytest.mark.parametrize("window", [Window(3), Window(4, 1), Window(5, 1, 2), Window(20)])
@pytest.mark.parametrize("kernel", [(2, 3, 3), (9, 3, 2)])
@torch.no_grad()
def test_a_streamed_window_is_the_causal_one_and_both_are_the_mask_of_the_rule(window, kernel):
    latents, level, text = given(8)
    planned = model(f"window{kernel}")
    causal = planned(latents, level, text, window=window).sample
    truth = model()(latents, level, text, mask=seen(kernel, window, 8)[None, None]).sample
    torch.testing.assert_close(causal, truth, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(stream(planned, window, latents, text), truth, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(stream(planned, window, latents, text, spare=2), truth, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", STREAMED)
@torch.no_grad()
def test_a_stream_under_a_plan_of_everything_is_the_stream(attention):
    latents, _, text = given(8)
    window = Window(4, 1)
    out = stream(model(attention), window, latents, text)
    torch.testing.assert_close(out, stream(model(), window, latents, text), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("windows(1, 2, 3)", 'must be like "window'),
        ("window(1, 2", 'must be like "window'),
        ("__import__('os')", 'must be like "window'),
        ("window(1, 2)", r"window takes \(frames, rows, columns\)"),
        ("window(0, 2, 2)", "whole numbers above 0"),
        ("window(3, 2, 2, stride=2)", "window takes no keywords, got stride"),
        ("pisa(0.5)", "no numbers without a keyword"),
        ("pisa(share=0.5)", "pisa takes density, block, first_order, got share"),
    ],
)
def test_what_no_planner_takes_is_refused_with_what_they_do(attention, message):
    with pytest.raises(ValueError, match=message):
        model(attention)


@torch.no_grad()
def test_planners_that_need_a_whole_sequence_are_refused_where_there_is_none():
    latents, level, text = given(4)
    with pytest.raises(ValueError, match="radial needs the queries of a whole sequence"):
        stream(model("radial"), Window(3), latents, text)
    with pytest.raises(ValueError, match="pisa chooses blocks for queries that see everything"):
        model("pisa")(latents, level, text, window=Window(3))
    with pytest.raises(ValueError, match="a mask alone says nothing of frames"):
        model("pisa")(latents, level, text, mask=torch.ones(1, 1, 96, 96, dtype=torch.bool))


def test_the_name_is_saved_with_the_model_and_can_be_taken_off(tmp_path):
    transformer = model()
    transformer.set_attention("pisa(density=0.2)")
    transformer.save_pretrained(tmp_path)
    loaded = CausalTransformer3DModel.from_pretrained(tmp_path)
    assert loaded.config["attention"] == "pisa(density=0.2)"
    assert loaded._attention is not None
    loaded.set_attention(None)
    assert loaded.config["attention"] is None
    assert loaded._attention is None


@pytest.fixture(scope="module")
def world():
    from millstream import WorldPipeline

    return WorldPipeline.from_pretrained("freedoom")


def frames(world, attention: str | None, count: int = 2) -> torch.Tensor:
    world.transformer.set_attention(attention)
    control = WorldControl(prompt="a brown stone room", keys=frozenset({"KeyW"}))
    session = Session(world, control, generator=torch.Generator().manual_seed(0))
    try:
        return torch.cat([chunk.data for _ in range(count) for chunk in session.step()])
    finally:
        session.close()
        world.transformer.set_attention(None)


@pytest.mark.parametrize("attention", ["window(99, 99, 99)", "pisa(density=1.0)"])
def test_the_shipped_world_runs_under_a_plan_of_everything_as_without(world, attention):
    torch.testing.assert_close(frames(world, attention), frames(world, None), atol=2e-3, rtol=0.0)


def test_the_shipped_world_sees_less_through_a_window(world):
    assert (frames(world, "window(2, 3, 3)") - frames(world, None)).abs().mean() > 1e-3
