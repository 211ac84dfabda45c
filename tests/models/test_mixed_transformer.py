"""Words and pictures in one sequence: who sees whom, fed equals whole, weights by kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from millstream.models.mixed_transformer import MixedTransformer, mixed_mask, paint, write

TOKENS, CHANNELS = 6, 4


def model(routed: bool = False) -> MixedTransformer:
    torch.manual_seed(0)
    return MixedTransformer(
        vocab_size=11,
        channels=CHANNELS,
        picture_tokens=TOKENS,
        dim=32,
        num_heads=2,
        ffn_dim=48,
        num_layers=2,
        routed=routed,
    ).eval()


def sequence() -> tuple[list[Tensor], list[Tensor | None]]:
    """Words, a picture, words, another picture."""
    generator = torch.Generator().manual_seed(1)
    words = [torch.randint(11, (2, count), generator=generator) for count in (3, 4)]
    pictures = [torch.randn(2, TOKENS, CHANNELS, generator=generator) for _ in range(2)]
    levels = [torch.tensor([0.0, 0.0]), torch.tensor([0.3, 0.9])]
    return [words[0], pictures[0], words[1], pictures[1]], [None, levels[0], None, levels[1]]


def test_the_mask() -> None:
    seen = mixed_mask([0, 1, 0], [2, 2, 1])
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    assert mixed_mask([0], [2], before=1).int().tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("routed", [False, True])
@torch.no_grad()
def test_fed_piece_by_piece_equals_the_whole(routed: bool) -> None:
    mixed, (segments, sigmas) = model(routed), sequence()
    whole = mixed(segments, sigmas)
    cache = mixed.begin(2, 40)
    for segment, sigma, wanted in zip(segments, sigmas, whole):
        if sigma is None:
            found = torch.cat([mixed.feed(word, cache) for word in segment.split(1, dim=1)], dim=1)
        else:
            mixed.feed(segment + 1, cache, sigma, keep=False)  # a step of a denoising, which leaves no trace
            found = mixed.feed(segment, cache, sigma)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_who_sees_whom() -> None:
    mixed, (segments, sigmas) = model(), sequence()
    before = mixed(segments, sigmas)
    later = [*segments[:2], segments[2].clone(), segments[3]]
    later[2][:, 2] = (later[2][:, 2] + 1) % 11
    after = mixed(later, sigmas)
    for unchanged in range(2):
        assert torch.equal(before[unchanged], after[unchanged])
    assert torch.equal(before[2][:, :2], after[2][:, :2])
    assert not torch.equal(before[2][:, 2], after[2][:, 2])
    moved = [segments[0], segments[1].clone(), *segments[2:]]
    moved[1][:, -1] += 1
    after = mixed(moved, sigmas)
    assert (before[1][:, 0] - after[1][:, 0]).abs().max() > 1e-4, "inside a picture the first token sees the last"
    assert torch.equal(before[0], after[0])


@torch.no_grad()
def test_routed_weights_are_shared_ones_when_equal_and_each_kinds_own_otherwise() -> None:
    shared, routed, (segments, sigmas) = model(), model(routed=True), sequence()
    weights = shared.state_dict()
    for name in routed.state_dict():
        if name.startswith("blocks."):
            layer, _, rest = name.removeprefix("blocks.").split(".", 2)
            weights[name] = weights[f"blocks.{layer}.0.{rest}"]
    routed.load_state_dict(weights)
    for found, wanted in zip(routed(segments, sigmas), shared(segments, sigmas)):
        torch.testing.assert_close(found, wanted)
    words = routed(segments[:1], sigmas[:1])[0]
    for name, parameter in routed.named_parameters():
        if name.startswith("blocks.") and name.split(".")[2] == "1":
            parameter.add_(0.3)
    assert torch.equal(routed(segments[:1], sigmas[:1])[0], words), "words alone use no weight of pictures"
    assert not torch.allclose(routed(segments, sigmas)[2], shared(segments, sigmas)[2]), "but they look at pictures"


def test_it_learns_to_write_and_paint(tmp_path) -> None:
    """Two sentences, each with its picture, and after the picture what it was."""
    mixed = model(routed=True).train()
    words = torch.tensor([[1, 2, 3], [4, 5, 6]])
    pictures = torch.randn(2, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(3))
    names = torch.tensor([[7, 8], [9, 10]])
    optimizer = torch.optim.AdamW(mixed.parameters(), 5e-3, weight_decay=0)
    for step in range(250):
        generator = torch.Generator().manual_seed(step)
        noise, sigma = torch.randn(pictures.shape, generator=generator), torch.rand(2, generator=generator)
        noisy = torch.lerp(pictures, noise, sigma[:, None, None])
        clean = torch.zeros(2)
        _, velocity = mixed([words, noisy], [None, sigma])
        _, _, logits = mixed([words, pictures, names], [None, clean, None])
        first = F.cross_entropy(logits[:, 0], names[:, 1])
        loss = (velocity - (noise - pictures)).square().mean() + first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mixed.eval().save_pretrained(tmp_path)
    loaded = MixedTransformer.from_pretrained(tmp_path)
    with torch.no_grad():
        cache = loaded.begin(2, 20)
        loaded.feed(words, cache)
        noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(999))
        painted = paint(loaded, cache, noise, [1.0, 0.75, 0.5, 0.25, 0.0])
        assert (painted - pictures).square().mean() < 0.3 * (painted - pictures.flip(0)).square().mean()
        assert write(loaded, cache, names[:, :1], 1).tolist() == names[:, 1:].tolist()


def test_segments_that_do_not_fit_are_refused() -> None:
    mixed, (segments, sigmas) = model(), sequence()
    with pytest.raises(ValueError, match=r"words int64 \[B, n\] or a picture \[B, 6, 4\], got \[2, 5, 4\]"):
        mixed([torch.randn(2, 5, 4)], [sigmas[1]])
    with pytest.raises(ValueError, match="every picture needs its noise levels"):
        mixed(segments, [None] * 4)
