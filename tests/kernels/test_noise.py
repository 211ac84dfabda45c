"""Noise against published answers, against the statistics it must have, and against itself under every regrouping."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from millstream.kernels import philox_normal, philox_uniform
from millstream.kernels.noise.reference import element_words, philox_words

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
DRAWS = [philox_normal, philox_uniform]


def row(*values):
    return torch.tensor(values, dtype=torch.int64)


def words(text):
    return row(*(int(word, 16) for word in text.split()))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_published_answers(counter, key, answer):
    assert torch.equal(philox_words(words(counter), words(key)), words(answer))


def test_counters_in_a_batch_do_not_influence_one_another():
    counters = torch.stack([words(counter) for counter, _, _ in KNOWN_ANSWERS], dim=1)
    keys = torch.stack([words(key) for _, key, _ in KNOWN_ANSWERS], dim=1)
    answers = torch.stack([words(answer) for _, _, answer in KNOWN_ANSWERS], dim=1)
    assert torch.equal(philox_words(counters, keys), answers)


def test_where_seed_frame_step_and_element_go():
    """The layout is a promise: recorded seeds must give the same frames in later versions."""
    seed, frame, step = 0x299F31D0A4093822, 0x13198A2E85A308D3, 0x03707344
    got = element_words(row(seed), row(frame), step, 4 * 3)[:, 0]
    for column in range(3):
        counter = row(column, 0x85A308D3, 0x13198A2E, step)
        assert torch.equal(got[:, column], philox_words(counter, words("a4093822 299f31d0")))


def test_values_stay_what_they_are():
    torch.testing.assert_close(
        philox_normal(row(42), row(7), 3, (5,))[0],
        torch.tensor([-0.56080478, -0.35857385, 1.74504304, -0.20104401, 0.37772956]),
        atol=1e-7,
        rtol=0,
    )
    assert philox_uniform(row(0), row(0), 0, (4,))[0].tolist() == [
        (word >> 8) / 2**24 for word in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ]


def test_normal_moments():
    x = philox_normal(row(1), row(0), 0, (400_000,)).double()[0]
    assert abs(x.mean()) < 4 / 400_000**0.5
    assert abs(x.var() - 1) < 4 * (2 / 400_000) ** 0.5
    assert abs((x**3).mean()) < 4 * (15 / 400_000) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / 400_000) ** 0.5
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.001, 0.999, 41).double())
    share = (x.unsqueeze(-1) < quantiles).double().mean(0)
    assert (share - torch.linspace(0.001, 0.999, 41).double()).abs().max() < 2 / 400_000**0.5
    assert 4.0 < x.abs().max() < 6.8


def test_uniform_moments_and_range():
    x = philox_uniform(row(1), row(0), 0, (400_000,))[0]
    assert x.min() >= 0
    assert x.max() < 1
    counts = torch.histc(x, 100, 0, 1)
    assert (counts - 4000).abs().max() < 5 * 4000**0.5
    assert abs(x.double().mean() - 0.5) < 4 * (1 / 12 / 400_000) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_no_dtype_rounds_a_uniform_up_to_one(dtype):
    x = philox_uniform(row(1), row(0), 0, (200_000,), dtype=dtype)
    assert x.dtype == dtype
    assert x.max() < 1
    exact = philox_uniform(row(1), row(0), 0, (200_000,), dtype=torch.float64)
    assert (x.double() <= exact).all()
    assert (exact - x.double()).max() <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_normals_of_other_dtypes_are_the_float32_ones_converted(dtype):
    arguments = (row(1), row(0), 0, (1001,))
    assert torch.equal(philox_normal(*arguments, dtype=dtype), philox_normal(*arguments).to(dtype))


def test_neighbours_are_independent():
    """Seeds, frames, steps and elements one apart, and high words alone apart, give unrelated noise."""
    size = 20_000
    base = (5, 9, 2)
    others = [(6, 9, 2), (5, 10, 2), (5, 9, 3), (9, 5, 2), (5, 9 + 2**32, 2), (5 + 2**32, 9, 2), (5, 2, 9)]
    x = philox_normal(row(base[0]), row(base[1]), base[2], (size,))[0]
    for seed, frame, step in others:
        y = philox_normal(row(seed), row(frame), step, (size,))[0]
        assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 4.5 / size**0.5, (seed, frame, step)
        assert abs(torch.corrcoef(torch.stack([x**2, y**2]))[0, 1]) < 4.5 / size**0.5, (seed, frame, step)
    for lag in (1, 2, 3, 4, 8):
        assert abs(torch.corrcoef(torch.stack([x[:-lag], x[lag:]]))[0, 1]) < 4.5 / size**0.5, lag


@pytest.mark.parametrize("draw", DRAWS)
def test_rows_together_are_rows_alone(draw):
    seeds, frames = row(3, 2**63 - 1, 3, 0), row(0, 10, 2**40 + 1, 10**7)
    together = draw(seeds, frames, 4, (3, 7, 11))
    assert together.shape == (4, 3, 7, 11)
    for r in range(4):
        assert torch.equal(together[r : r + 1], draw(seeds[r : r + 1], frames[r : r + 1], 4, (3, 7, 11)))


@pytest.mark.parametrize("draw", DRAWS)
def test_the_number_of_elements_does_not_change_the_first_ones(draw):
    longest = draw(row(3), row(1), 0, (1000,))
    for count in (1, 2, 3, 4, 5, 63, 999):
        assert torch.equal(draw(row(3), row(1), 0, (count,)), longest[:, :count])
    assert torch.equal(draw(row(3), row(1), 0, (10, 100)).flatten(1), longest)
    assert draw(row(3), row(1), 0, ()).shape == (1,)
    assert draw(row(3), row(1), 0, (0, 4)).shape == (1, 0, 4)
    assert draw(row(), row(), 0, (4,)).shape == (0, 4)


@pytest.mark.parametrize("draw", DRAWS)
def test_the_global_generator_is_neither_read_nor_moved(draw):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = draw(row(3), row(1), 0, (8,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(draw(row(3), row(1), 0, (8,)), first)


@pytest.mark.parametrize("draw", DRAWS)
def test_threads_change_nothing(draw):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = draw(row(3), row(1), 0, (300_000,))
        torch.set_num_threads(2)
        assert torch.equal(draw(row(3), row(1), 0, (300_000,)), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("draw", DRAWS)
def test_what_does_not_fit_is_refused_with_what_was_seen_and_wanted(draw):
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\^63\), got -1"):
        draw(row(4, -1), row(0, 0), 0, (4,))  # what 2^64 - 1 becomes in an int64
    with pytest.raises(TypeError, match=r"seed must be an int64 tensor \[R\], got torch.uint64"):
        draw(torch.tensor([2**63], dtype=torch.uint64), row(0), 0, (4,))
    with pytest.raises(TypeError, match=r"seed must be an int64 tensor .* got int"):
        draw(2**63, row(0), 0, (4,))
    with pytest.raises(TypeError, match=r"frame must be .* got torch.float32"):
        draw(row(0), torch.zeros(1), 0, (4,))
    with pytest.raises(ValueError, match=r"one value per row, got \[2\] and \[1\]"):
        draw(row(0, 1), row(0), 0, (4,))
    for step in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"step must be in \[0, 2\^32\), got {step}"):
            draw(row(0), row(0), step, (4,))
    with pytest.raises(TypeError, match=r"got torch.int32"):
        draw(row(0), row(0), 0, (4,), dtype=torch.int32)
    with pytest.raises(ValueError, match=r"2\^34 elements"):
        draw(row(0), row(0), 0, (2**20, 2**20))


INTERPRETED = """
import torch
from millstream.kernels.noise.reference import philox_normal_reference, philox_uniform_reference
from millstream.kernels.noise.triton import philox_triton

seed = torch.tensor([3, 2**63 - 1, 2**62 + 12345678901])
frame = torch.tensor([0, 10, 2**40 + 5])
for step, count in ((0, 0), (0, 1), (1, 63), (2**32 - 1, 1001), (2, 3072)):
    normal = philox_triton(seed, frame, step, count, bits=None)
    torch.testing.assert_close(normal, philox_normal_reference(seed, frame, step, count), atol=0, rtol=2e-7)
    for bits in (8, 11, 24, 32):
        uniform = philox_triton(seed, frame, step, count, bits=bits)
        assert torch.equal(uniform, philox_uniform_reference(seed, frame, step, count, bits)), (step, count, bits)
print("equal")
"""


def test_the_triton_kernel_draws_the_same_under_its_interpreter(interpret):
    printed, complaints = interpret(INTERPRETED)
    assert printed == "equal", complaints


def test_triton_is_not_imported_before_a_cuda_tensor_comes():
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import millstream.kernels as k; "
        "k.philox_normal(torch.tensor([1]), torch.tensor([1]), 0, (4,)); print(before, 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() in ("False False", "True True"), done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(1,), (63,), (16, 12, 16), (1001, 1000)])
def test_cuda_draws_the_same(shape):
    seed, frame = row(3, 2**63 - 1, 3), row(0, 10, 2**40 + 1)
    for step in (0, 1, 2, 2**32 - 1):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            ours = philox_uniform(seed.cuda(), frame.cuda(), step, shape, dtype=dtype)
            assert torch.equal(ours.cpu(), philox_uniform(seed, frame, step, shape, dtype=dtype))
        ours, cpu = philox_normal(seed.cuda(), frame.cuda(), step, shape).cpu(), philox_normal(seed, frame, step, shape)
        torch.testing.assert_close(ours, cpu, atol=1e-12, rtol=2e-7)
        assert (ours != cpu).double().mean() < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_draws_anew_when_the_frame_moves():
    seed, frame = row(3).cuda(), row(0).cuda()
    philox_normal(seed, frame, 1, (1000,))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noise = philox_normal(seed, frame, 1, (1000,))
    for index in (5, 6):
        frame.fill_(index)
        graph.replay()
        assert torch.equal(noise.cpu(), philox_normal(seed, row(index).cuda(), 1, (1000,)).cpu())
