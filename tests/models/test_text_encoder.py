"""The byte-level prompt encoder: what people vary without meaning anything must not matter."""

from __future__ import annotations

import pytest
import torch

from millstream.models.text_encoder import PADDING, ByteTextEncoder


@pytest.fixture(scope="module")
def encoder() -> ByteTextEncoder:
    torch.manual_seed(0)
    return ByteTextEncoder(dim=16, tokens=3, layers=2, heads=2, max_bytes=24).eval()


@torch.no_grad()
def test_shape(encoder):
    assert encoder.encode(["a maze", "", "a slime pool"]).shape == (3, 3, 16)


@torch.no_grad()
def test_case_and_spaces_do_not_matter(encoder):
    plain, shouted, spread = encoder.encode(["a dark maze", "A DARK Maze", "  a   dark\n maze\t"])
    assert torch.allclose(plain, shouted, atol=1e-6)  # rows of a batch may be added up in different orders
    assert torch.allclose(plain, spread, atol=1e-6)
    assert not torch.allclose(plain, encoder.encode(["a bark maze"])[0])


def test_bytes_are_utf8_with_a_space_on_each_side(encoder):
    row = encoder.tokenize(["Öl"])[0].tolist()
    assert row[:5] == list(" öl ".encode())
    assert set(row[5:]) == {PADDING}


@torch.no_grad()
def test_padding_does_not_leak(encoder):
    """A prompt means the same among longer prompts, and with no padding at all."""
    tokens = encoder.tokenize(["a maze", "a very long corridor"])
    alone = encoder(tokens[:1, :8])
    assert PADDING not in tokens[0, :8]
    torch.testing.assert_close(encoder(tokens)[:1], alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(encoder(tokens[:1, :12]), alone, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_long_prompts_are_cut(encoder):
    long = "a green slime arena with medkits and much more"
    assert torch.equal(encoder.encode([long])[0], encoder.encode([long + " that nobody reads"])[0])
    assert encoder.tokenize(["x" * 1000]).shape == (1, 24)


@pytest.mark.parametrize("prompt", ["", "🧟" * 20, "темный лабиринт", "暗い迷路", "\x00", "a\u0301"])
@torch.no_grad()
def test_any_text_is_a_prompt(encoder, prompt):
    assert encoder.encode([prompt]).isfinite().all()


@torch.no_grad()
def test_words_in_another_order_are_another_prompt(encoder):
    first, second = encoder.encode(["red maze", "maze red"])
    assert not torch.allclose(first, second, atol=1e-4)


def test_summary_is_a_unit_vector(encoder):
    summary = encoder.summary(encoder.encode(["a maze", ""]))
    torch.testing.assert_close(summary.norm(dim=-1), torch.ones(2))


@torch.no_grad()
def test_save_and_load(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    loaded = ByteTextEncoder.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.encode(["a maze"]), encoder.encode(["a maze"]))
