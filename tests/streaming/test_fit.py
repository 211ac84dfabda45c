import pytest
import torch

from millstream.streaming import fit

SIZE = (96, 128)


@pytest.mark.parametrize(
    "size", [(480, 640), (1080, 1920), (1920, 1080), (97, 129), (96, 400), (9, 9), (1, 1), (3, 700)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_any_size_and_shape_fits(size, dtype):
    picture = torch.full((3, *size), 51, dtype=torch.uint8)
    fitted = fit(picture if dtype == torch.uint8 else picture / 255, SIZE)
    assert fitted.shape == (3, *SIZE)
    assert fitted.dtype == torch.float32
    assert fitted.sub(0.2).abs().max() < 1e-6


@pytest.mark.parametrize(("height", "width"), [(96, 256), (192, 128)])
def test_the_middle_is_kept_and_the_sides_are_cut(height, width):
    picture = torch.zeros(3, height, width)
    top, left = (height - 96) // 2, (width - 128) // 2
    picture[:, top : top + 96, left : left + 128] = 1
    assert torch.equal(fit(picture, SIZE), torch.ones(3, *SIZE))


def test_shrinking_averages_and_does_not_flicker():
    stripes = torch.zeros(3, 960, 1280)
    stripes[..., ::2] = 1
    assert torch.allclose(fit(stripes, SIZE), torch.full((3, *SIZE), 0.5))
    assert torch.allclose(fit(stripes.roll(1, -1), SIZE), torch.full((3, *SIZE), 0.5))


def test_a_picture_that_fits_is_not_copied_and_a_full_byte_is_white():
    picture = torch.rand(3, *SIZE)
    assert fit(picture, SIZE) is picture
    assert fit(torch.full((3, *SIZE), 255, dtype=torch.uint8), SIZE).eq(1).all()


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (torch.zeros(96, 128, 3), r"must be \[3, H, W\], got \[96, 128, 3\]"),
        (torch.zeros(1, 3, 96, 128), r"must be \[3, H, W\]"),
        (torch.zeros(3, 0, 128), r"must be \[3, H, W\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "floats from 0 to 1 or in uint8, got torch.int64"),
    ],
)
def test_what_is_no_picture_is_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        fit(picture, SIZE)
