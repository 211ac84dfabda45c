"""Clips drawn in parallel against a loop that spells SoundStorm's decoding out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from millstream.kernels import philox_uniform
from millstream.models.conformer import Conformer, FrameConvolution
from millstream.models.masked_sound import MaskedSoundTransformer
from millstream.pipelines.sound_tokens import draw_codes, level_plan
from millstream.samplers import Categorical, Confidence

Q, V, B, FRAMES = 3, 11, 2, 10
SEEDS = torch.tensor([5, 6])


def model(**changes: object) -> MaskedSoundTransformer:
    torch.manual_seed(0)
    sizes = {"levels": Q, "vocab_size": V, "condition_size": 7, "dim": 16, "num_heads": 2, "ffn_dim": 24}
    net = MaskedSoundTransformer(**{**sizes, "num_layers": 2, **changes}).eval()  # type: ignore[arg-type]
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


def condition(frames: int = FRAMES) -> Tensor:
    return torch.randint(7, (B, -(-frames // 2)), generator=torch.Generator().manual_seed(1))


def codes(frames: int) -> Tensor:
    return torch.randint(V, (B, Q, frames), generator=torch.Generator().manual_seed(2))


def uniform(step: int, kind: int) -> Tensor:
    return philox_uniform(SEEDS, torch.zeros_like(SEEDS), 4 * step + kind, (FRAMES,))


def slow(net: MaskedSoundTransformer, told: Tensor, prompt: Tensor | None, steps: int) -> Tensor:
    """Levels one after the other; on the first the surest places first, everything computed anew at every step."""
    kept = 0 if prompt is None else prompt.shape[2]
    found = torch.zeros(B, Q, FRAMES, dtype=torch.int64)
    if prompt is not None:
        found[:, :, :kept] = prompt
    known = torch.zeros(B, FRAMES, dtype=torch.bool)
    known[:, :kept] = True
    opened, left = FRAMES - kept, FRAMES - kept
    for step in range(steps):
        logits = net(found, known, 0, told, prompt=kept)
        drawn = Categorical().invert(logits, uniform(step, 1))
        sure = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        gumbel = -(-uniform(step, 2).log()).log()
        score = (sure + 4.5 * (1 - step / (steps - 1)) * gumbel).masked_fill(known, -torch.inf)
        after = max(steps - 1 - step, min(left - 1, math.floor(opened * math.cos(math.pi * (step + 1) / steps / 2))))
        for row in range(B):
            for place in score[row].argsort(descending=True)[: left - after].tolist():
                found[row, 0, place], known[row, place] = drawn[row, place], True
        left = after
    for level in range(1, Q):
        known = (torch.arange(FRAMES) < kept).expand(B, -1)
        best = net(found, known, level, told, prompt=kept).argmax(-1)
        found[:, level, kept:] = best[:, kept:]
    return found


@pytest.mark.parametrize(("kernel", "kept"), [(3, 0), (3, 4), (None, 4)])
@torch.no_grad()
def test_the_parallel_drawing_equals_the_slow_loop(kernel: int | None, kept: int) -> None:
    net, prompt = model(kernel=kernel), codes(kept) if kept else None
    drawn = draw_codes(net, FRAMES, SEEDS, condition=condition(), prompt=prompt, steps=(4,))
    assert torch.equal(drawn, slow(net, condition(), prompt, 4))
    if prompt is not None:
        assert torch.equal(drawn[:, :, :kept], prompt)
        other = draw_codes(net, FRAMES, SEEDS, condition=condition(), prompt=(prompt + 1) % V, steps=(4,))
        assert not torch.equal(drawn[:, :, kept:], other[:, :, kept:]), "the prompt was not looked at"


@torch.no_grad()
def test_a_clip_depends_on_its_own_seed_and_on_its_condition() -> None:
    net = model()
    both = draw_codes(net, FRAMES, SEEDS, condition=condition(), steps=(4,))
    alone = draw_codes(net, FRAMES, SEEDS[1:], condition=condition()[1:], steps=(4,))
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both, draw_codes(net, FRAMES, SEEDS, condition=(condition() + 1) % 7, steps=(4,)))


@torch.no_grad()
def test_a_level_sees_coarser_levels_but_finer_ones_in_the_prompt_alone() -> None:
    net, known = model(), torch.arange(FRAMES).expand(B, -1) < 4
    found = codes(FRAMES)
    seen = net(found, known, 1, condition(), prompt=4)

    def changed(level: int, frames: slice) -> bool:
        other = found.clone()
        other[:, level, frames] = (other[:, level, frames] + 1) % V
        return not torch.equal(net(other, known, 1, condition(), prompt=4), seen)

    late, early = slice(4, None), slice(0, 4)
    assert changed(0, late)
    assert changed(0, early)
    assert changed(1, early)
    assert not changed(1, late)
    assert changed(2, early)
    assert not changed(2, late)


@torch.no_grad()
def test_the_convolution_of_frames_is_a_convolution() -> None:
    layer, x = FrameConvolution(8, 5), torch.randn(2, 9, 8)
    hidden = torch.nn.functional.glu(layer.up(layer.norm(x)), dim=-1).transpose(1, 2)
    mixed = torch.nn.functional.conv1d(hidden, layer.taps.T[:, None], padding=2, groups=8).transpose(1, 2)
    wanted = layer.down(torch.nn.functional.silu(layer.norm_mixed(mixed)))
    torch.testing.assert_close(layer(x), wanted)


def test_the_published_size() -> None:
    with torch.device("meta"):
        net = MaskedSoundTransformer()
    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(316e6, rel=0.01)
    plan = level_plan(12, 1500)
    assert [len(level.counts or []) for level in plan] == [16, *[1] * 11]
    assert isinstance(plan[0].order, Confidence)
    assert plan[1].head == Categorical(0.0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="kernel must be odd, so that a frame is in the middle of it, got 4"):
        Conformer(1, 8, 1, 8, 4)
    with pytest.raises(ValueError, match=r"10 frames need conditioning tokens \[B, 5\], got \[2, 4\]"):
        draw_codes(model(), FRAMES, SEEDS, condition=condition(8))
    with pytest.raises(ValueError, match=r"conditioning tokens must be int64 \[B, 5\], got None"):
        draw_codes(model(), FRAMES, SEEDS)
    with pytest.raises(ValueError, match=r"prompt must be codes \[2, 3, P\] of fewer than 10 frames, got \[2, 3, 10\]"):
        draw_codes(model(), FRAMES, SEEDS, condition=condition(), prompt=codes(10))
    with pytest.raises(ValueError, match=r"steps must be for at most 3 levels, got \[4, 1, 1, 1\]"):
        level_plan(3, 10, (4, 1, 1, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.no_grad()
def test_a_whole_clip_is_one_cuda_graph() -> None:
    """No value is read back, so it can be recorded; another seed in the same memory gives another clip."""
    net, told, seeds = model().cuda(), condition().cuda(), SEEDS.cuda()

    def draw() -> Tensor:
        return draw_codes(net, FRAMES, seeds, condition=told, steps=(4,))

    wanted = draw()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = draw()
    graph.replay()
    assert torch.equal(recorded, wanted)
    seeds += 100
    graph.replay()
    assert not torch.equal(recorded, wanted)
    assert torch.equal(recorded, draw())
