"""`millstream image` as a user meets it, with a pipeline that paints every picture in the colour of its number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from millstream.ui import cli
from millstream.ui.commands import image as command


class Painter:
    """Keeps what it was asked; picture i has red i / 10 everywhere."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def __call__(self, prompt: str, **given: Any) -> Any:
        self.asked = {"prompt": prompt, "seed": given.pop("generator").initial_seed(), **given}
        pictures = torch.zeros(given["num_images_per_prompt"], 3, 8, 8)
        pictures[:, 0] = torch.arange(len(pictures))[:, None, None] / 10
        if given["callback_on_step_end"] is not None:
            for step in range(3):
                given["callback_on_step_end"](self, step, step, {"preview": torch.full((1, 3, 8, 8), step / 2)})
        return type("Output", (), {"images": pictures})


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Painter:
    painter = Painter()
    monkeypatch.setattr(command, "load_image", lambda name, device: painter)
    monkeypatch.chdir(tmp_path)
    return painter


def test_one_picture_is_written_and_enlarged(painter: Painter, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["image", "a red apple", "-o", "apple.png", "--seed", "7", "--steps", "5"]) == 0
    assert Image.open("apple.png").size == (32, 32)
    assert painter.asked["prompt"] == "a red apple"
    assert (painter.asked["seed"], painter.asked["num_inference_steps"]) == (7, 5)
    assert "apple.png: drawn in" in capsys.readouterr().out


def test_several_are_numbered(painter: Painter) -> None:
    assert cli.main(["image", "apples", "-o", "apple.png", "--count", "3", "--scale", "1"]) == 0
    reds = [np.asarray(Image.open(f"apple-{number}.png"))[0, 0, 0] for number in (1, 2, 3)]
    assert reds == [0, 26, 51]


def test_previews_are_written_as_they_come(painter: Painter) -> None:
    assert cli.main(["image", "apple", "-o", "a.png", "--preview"]) == 0
    assert sorted(path.name for path in Path().glob("a-step-*.png")) == [f"a-step-{n}.png" for n in (1, 2, 3)]
    assert np.asarray(Image.open("a-step-3.png")).min() == 255


def test_pictures_to_paint_into_are_handed_on(painter: Painter) -> None:
    Image.new("RGB", (9, 9), "blue").save("in.png")
    Image.new("L", (9, 9), 255).save("mask.png")
    assert cli.main(["image", "apple", "--image", "in.png", "--mask", "mask.png"]) == 0
    assert (painter.asked["image"].size, painter.asked["mask_image"].mode) == ((9, 9), "L")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["image", " "], "the prompt is empty"),
        (["image", "x", "-o", "x.txt"], "x.txt is no picture that can be written"),
        (["image", "x", "-o", "nowhere/x.png"], "the folder nowhere does not exist"),
        (["image", "x", "--image", "nothing.png"], "nothing.png: No such file"),
        (["image", "x", "--image", "text.png"], "text.png is no picture that can be read"),
        (["image", "x", "--count", "0"], "must be a whole number of 1 or more, got '0'"),
        (["image", "x", "--order", "spiral"], "invalid choice: 'spiral'"),
        (["image", "x", "--guidance", "nan"], "guidance_scale must be at least 1 (no guidance) and finite, got nan"),
        (["image", "x", "--mask", "text.png"], "--mask says where to paint in a picture; give --image too"),
        (["image", "x", "--scale", "100000"], "--scale can be up to 64, got 100000"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    painter: Painter, words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    Path("text.png").write_text("no picture")
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert painter.asked == {}


def test_a_model_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("millstream.pipelines.assets.ASSETS", tmp_path)
    assert cli.main(["image", "an apple"]) == 2
    assert "millstream train emoji-data" in capsys.readouterr().err
    assert cli.main(["image", "an apple", "--model", "fruit"]) == 2
    assert "no model 'fruit': give emoji" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))
