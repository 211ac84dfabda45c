"""Streams of codes, one frame or several per pass, against a loop that computes everything anew for every frame."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from millstream.kernels import philox_uniform
from millstream.models.frame_tokens import FrameTokenTransformer
from millstream.pipelines.sound_frames import FrameStream
from millstream.samplers import Categorical

Q, V, R, WINDOW = 3, 9, 2, 5
SEEDS = torch.tensor([3, 4])


def model(**changes: object) -> FrameTokenTransformer:
    torch.manual_seed(0)
    sizes = {"levels": Q, "vocab_size": V, "condition_size": 6, "dim": 16, "num_heads": 2, "ffn_dim": 24}
    depth = {"depth_dim": 8, "depth_heads": 2, "depth_layers": 2, "num_layers": 2, "chained": 3, "window": WINDOW}
    net = FrameTokenTransformer(**{**sizes, **depth, **changes}).eval()  # type: ignore[arg-type]
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return net


def condition(frames: int) -> Tensor:
    return torch.randint(6, (R, frames), generator=torch.Generator().manual_seed(1))


def slow(net: FrameTokenTransformer, told: Tensor, per_pass: int) -> Tensor:
    """Frame after frame: its head is the number of frames since the pass began, and nothing is kept."""
    frames = told.shape[1]
    codes = torch.zeros(R, Q, frames, dtype=torch.int64)
    for frame in range(frames):
        number = frame % per_pass
        for level in range(Q):
            logits = net(codes[:, :, : frame + 1], told[:, : frame + 1])[number][:, -1, level]
            uniform = philox_uniform(SEEDS, torch.full((R,), frame), level, ())
            codes[:, level, frame] = Categorical().invert(logits, uniform)
    return codes


@pytest.mark.parametrize("per_pass", [1, 2, 4])
@torch.no_grad()
def test_a_stream_equals_the_slow_loop(per_pass: int) -> None:
    """Far past the window, so that the ring has turned."""
    net, frames = model(), 16
    stream = FrameStream(net, per_pass)
    state = stream.begin(SEEDS)
    drawn = [stream.step(state, part) for part in condition(frames).split(per_pass, dim=1)]
    assert [part.shape[2] for part in drawn] == [per_pass] * (frames // per_pass)
    made = torch.cat(drawn, dim=2)
    assert torch.equal(made, slow(net, condition(frames), per_pass))
    assert made.unique().numel() > 4, "a test of one code proves nothing"


@torch.no_grad()
def test_logits_see_no_later_frame_and_no_finer_level() -> None:
    net = model()
    codes = torch.randint(V, (R, Q, 8), generator=torch.Generator().manual_seed(2))
    told = condition(8)
    before = net(codes, told)
    codes[:, 1, 5] = (codes[:, 1, 5] + 1) % V
    after = net(codes, told)
    for number, (a, b) in enumerate(zip(before, after)):
        assert a.shape == (R, 8 - number, Q, V)
        frame = 5 - number
        assert torch.equal(a[:, :frame], b[:, :frame])
        assert torch.equal(a[:, frame, :2], b[:, frame, :2])
        assert not torch.equal(a[:, frame, 2], b[:, frame, 2])
        # A head reads the frame before the one that it says, the large model too; so do all later ones.
        assert not torch.equal(a[:, frame + 1], b[:, frame + 1])


@torch.no_grad()
def test_a_chained_head_reads_the_frame_that_was_just_drawn() -> None:
    """The frame before reaches head 1 through its own input: the large model has not read it yet."""
    net, told = model(), condition(2)
    codes = torch.randint(V, (R, Q, 2), generator=torch.Generator().manual_seed(2))
    other = codes.clone()
    other[:, :, 0] = (codes[:, :, 0] + 1) % V
    first, second = net(codes, told)[1], net(other, told)[1]
    assert first.shape == (R, 1, Q, V)
    assert not torch.equal(first, second)


@torch.no_grad()
def test_a_voice_goes_on_from_known_frames() -> None:
    """A stream that is shown the first frames of another one goes on as that one did; other frames lead elsewhere."""
    net, told = model(), condition(12).split(2, dim=1)
    stream = FrameStream(net, 2)
    whole, again, other = (stream.begin(SEEDS) for _ in range(3))
    drawn = [stream.step(whole, part) for part in told]
    for k in range(3):
        assert torch.equal(stream.step(again, told[k], drawn[k]), drawn[k])
        stream.step(other, told[k], (drawn[k] + 1) % V)
    assert all(torch.equal(stream.step(again, told[k]), drawn[k]) for k in range(3, 6))
    assert any(not torch.equal(stream.step(other, told[k]), drawn[k]) for k in range(3, 6))


@torch.no_grad()
def test_a_saved_voice_is_resumed_by_any_number_of_streams(tmp_path: Path) -> None:
    net, told = model(), condition(12).split(2, dim=1)
    stream = FrameStream(net, 2)
    state = stream.begin(SEEDS)
    for part in told[:3]:
        stream.step(state, part)
    save_file(stream.save(state, 1), tmp_path / "voice.safetensors")
    resumed = stream.resume(load_file(tmp_path / "voice.safetensors"), torch.tensor([SEEDS[1], 99]))
    same = [part[1:].expand(2, -1) for part in told]
    drawn = [(stream.step(state, told[k]), stream.step(resumed, same[k])) for k in range(3, 6)]
    assert all(torch.equal(a[1], b[0]) for a, b in drawn)
    assert any(not torch.equal(b[0], b[1]) for _, b in drawn)
    with pytest.raises(ValueError, match=r"the saved codes must be \[3, 4\], got \[3, 2\]"):
        FrameStream(net, 4).resume(stream.save(state), SEEDS)


@torch.no_grad()
def test_memory_is_fixed_and_a_stream_depends_on_its_own_seed() -> None:
    net = model(condition_size=None)
    stream = FrameStream(net, 2)
    both, alone = stream.begin(SEEDS), stream.begin(SEEDS[1:])
    size, address = both.cache.bytes, both.cache.k.data_ptr()
    for _ in range(8):
        assert torch.equal(stream.step(both)[1:], stream.step(alone))
    assert (both.cache.bytes, both.cache.k.data_ptr()) == (size, address)
    assert both.frames == 16


def test_training_reaches_every_weight() -> None:
    net = model()
    codes = torch.randint(V, (R, Q, 8), generator=torch.Generator().manual_seed(2))
    losses = [
        torch.nn.functional.cross_entropy(logits.flatten(0, 2), codes[:, :, number:].transpose(1, 2).flatten())
        for number, logits in enumerate(net(codes, condition(8)))
    ]
    torch.stack(losses).sum().backward()
    unused = {"tokens.masks", "depth.tokens.masks", f"depth.tokens.levels.{Q - 1}.weight"}
    dead = {name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert dead == unused


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"frames_per_pass must be from 1 to 4 .* got 5"):
        FrameStream(model(), 5)
    stream = FrameStream(model(), 2)
    with pytest.raises(ValueError, match=r"conditioning tokens must be int64 \[2, 2\], one per frame, got none"):
        stream.step(stream.begin(SEEDS))
    with pytest.raises(ValueError, match=r"known codes must be \[2, 3, 2\], a pass of them, got \[2, 3, 5\]"):
        stream.step(stream.begin(SEEDS), condition(2), torch.zeros(2, 3, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must be none, got \[2, 2\]"):
        FrameStream(model(condition_size=None), 2).step(stream.begin(SEEDS), condition(2))
