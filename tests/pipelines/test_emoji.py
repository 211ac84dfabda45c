"""The image model that ships: it fits, loads by name, and draws in the colours it is asked for, whole and in holes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import millstream as ms
from millstream.pipelines.assets import shipped

FOLDER = shipped("emoji")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="this checkout has no assets/emoji")
MOST_BYTES = 4_000_000


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = ms.ImagePipeline.from_pretrained("emoji")
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipe: Any, prompt: str, **given: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, generator=generator, output_type="pt", **given).images


def test_it_fits() -> None:
    assert FOLDER is not None
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors")) <= MOST_BYTES
    assert (FOLDER / "README.md").is_file()


@pytest.mark.parametrize(
    ("prompt", "channel"), [("a red apple", 0), ("please paint a green apple for me", 1), ("one blue heart", 2)]
)
@pytest.mark.parametrize("order", ["random", "masked"])
def test_colours_follow_the_words(pipe: Any, prompt: str, channel: int, order: str) -> None:
    pictures = drawn(pipe, prompt, order=order, num_images_per_prompt=4)
    assert pictures.shape == (4, 3, 64, 64)
    coloured = pictures[:, :, 16:48, 16:48].mean(dim=(0, 2, 3))
    assert int(coloured.argmax()) == channel
    corners = pictures[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert float(corners.mean()) > 0.9, "on white"


def test_the_same_seed_is_the_same_picture(pipe: Any) -> None:
    assert torch.equal(drawn(pipe, "a cat face"), drawn(pipe, "a cat face"))


def test_a_hole_is_filled_and_the_rest_is_kept(pipe: Any) -> None:
    (whole,) = drawn(pipe, "a yellow heart")
    mask = torch.zeros(64, 64)
    mask[:, 32:] = 1
    (filled,) = drawn(pipe, "a yellow heart", image=whole, mask_image=mask)
    assert torch.equal(filled[:, :, :32], whole[:, :, :32])
    red, _, blue = filled[:, 24:40, 36:44].mean(dim=(1, 2))
    assert float(red - blue) > 0.3, "yellow"


def test_millstream_image(pipe: Any, tmp_path: Any) -> None:
    from millstream.ui import cli

    assert cli.main(["image", "a red apple", "-o", str(tmp_path / "apple.png"), "--device", "cpu"]) == 0
    with Image.open(tmp_path / "apple.png") as picture:
        assert picture.size == (256, 256)
