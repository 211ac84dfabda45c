"""The Image form: in a browser, with a pipeline that paints the length of the prompt; and its parts without one."""

from __future__ import annotations

import base64
import io
import re
import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from millstream.models.text_encoder import ByteTextEncoder
from millstream.models.token_transformer import TokenTransformer
from millstream.models.vq_codec import VQAutoencoder
from millstream.pipelines.image import ImagePipeline
from millstream.samplers import TokenSampler
from millstream.ui.page import PageSettings
from millstream.ui.page import image as form
from millstream.ui.server.settings import Settings

PICTURE = "#ms-image-pictures img"


def red(view: Any) -> int:
    """Of the first picture; -1 where there is none."""
    sources = view.page.eval_on_selector_all(PICTURE, "images => images.map((image) => image.src)")
    return int(decoded(sources[0])[0, 0, 0]) if sources else -1


def decoded(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


@pytest.fixture
def typed(view: Any) -> Any:
    """The line for the prompt, once Gradio listens to it."""
    view.page.click("#tab-image")
    line = view.page.locator("#ms-image-prompt textarea")
    line.wait_for(state="visible")
    view.page.wait_for_load_state("networkidle")
    return line


def test_pictures_follow_what_is_typed(view: Any, typed: Any, painter: Any, wait: Any) -> None:
    assert "The pictures follow" in view.page.inner_text("#ms-image-pictures")
    typed.fill("cat")
    wait(lambda: re.search("step [0-9]+ of 16", view.page.inner_text("#ms-image-pictures")))
    assert red(view) == 128, "a preview is shown before the end"
    wait(lambda: red(view) == 30)
    assert view.page.locator(PICTURE).count() == 4
    assert re.search(r"drawn in \d+\.\d\d s", view.page.inner_text("#ms-image-pictures"))


def test_typing_on_ends_what_was_being_drawn(view: Any, typed: Any, painter: Any, wait: Any) -> None:
    before = len(painter.prompts), painter.steps
    typed.press_sequentially("a red apple", delay=60)
    wait(lambda: red(view) == 110)
    view.page.wait_for_timeout(300)
    assert red(view) == 110, "an older drawing came later"
    prompts = painter.prompts[before[0] :]
    assert prompts[-1] == "a red apple"
    assert painter.steps - before[1] < 16 * len(prompts) / 2, "older drawings went on"


def test_an_empty_line_clears_and_others_are_drawn(view: Any, typed: Any, painter: Any, wait: Any) -> None:
    typed.fill("dog")
    wait(lambda: red(view) == 30)
    view.page.click("#ms-image-more")
    wait(lambda: view.page.input_value("#ms-image-seed input") == "4")
    wait(lambda: painter.prompts[-2:] == ["dog", "dog"])
    typed.fill("")
    wait(lambda: "The pictures follow" in view.page.inner_text("#ms-image-pictures"))


def test_a_server_without_a_model_says_so(look: Any, serve: Any, world: Any) -> None:
    bare = serve(world, Settings(), PageSettings(pipeline=lambda: world))
    try:
        view = look(bare.url)
        view.page.click("#tab-image")
        assert "no model of pictures" in view.page.inner_text("#ms-image")
    finally:
        bare.close()


def tiny() -> ImagePipeline:
    torch.manual_seed(0)
    return ImagePipeline(
        TokenTransformer(
            grid=(4, 4), vocab_size=32, dim=64, num_heads=1, num_layers=1, num_cross_layers=1, text_dim=16
        ).eval(),
        VQAutoencoder(16, 32, 8, (8, 16), (1, 1), (1, 1)).eval(),
        ByteTextEncoder(dim=16, tokens=4, layers=1, max_bytes=32).eval(),
        TokenSampler(num_inference_steps=4),
    )


def test_a_real_pipeline_is_drawn_with_step_by_step() -> None:
    pipe = tiny()
    steps = list(form.drawing(pipe, "a cat", "random", 5, 3))
    assert [told for _, told in steps[:-1]] == [f"step {number} of 5" for number in (1, 2, 3, 4)]
    assert steps[-1][1].startswith("drawn in ")
    pictures = steps[-1][0]
    assert pictures.shape == (4, 3, 16, 16)
    generator = torch.Generator().manual_seed(4)
    alone: Any = pipe("a cat", order="random", num_inference_steps=5, generator=generator, output_type="pt")
    torch.testing.assert_close(pictures[1], alone.images[0], msg="the second picture is that of the next seed")
    html = form.figure(pictures, "done")
    shown = [decoded(source) for source in re.findall(r'<img src="([^"]+)"', html)]
    assert np.abs(shown[2] - (pictures[2].permute(1, 2, 0) * 255).numpy()).max() <= 0.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"order": "sideways"}, "order must be one of random, masked, raster, got 'sideways'"),
        ({"steps": 0}, "steps must be 1 to 64, got 0"),
        ({"steps": 10_000}, "steps must be 1 to 64, got 10000"),
        ({"seed": -1}, "seed must be 0 to 9007199254740991, got -1"),
        ({"prompt": "x" * 201}, "201 letters; at most 200"),
    ],
)
def test_fields_are_not_believed(changed: dict[str, Any], message: str) -> None:
    fields = {"prompt": "cat", "order": "random", "steps": 4, "seed": 0} | changed
    with pytest.raises(ValueError, match=re.escape(message)):
        next(form.drawing(None, **fields))


def test_the_newest_wish_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    wishes = form.Wishes()
    assert wishes.wish("me", 1.0)
    assert wishes.wish("me", 2.0)
    assert not wishes.wish("me", 1.5), "an older one that was seen later"
    assert wishes.stands("me", 2.0)
    assert not wishes.stands("me", 1.0)
    assert wishes.wish("you", 0.5)
    monkeypatch.setattr(form, "BROWSERS_KNOWN", 2)
    wishes.wish("another", 9.0)
    assert not wishes.stands("me", 2.0), "the browser that was silent longest is forgotten"


def test_an_older_picture_never_covers_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    wishes, shown = form.Wishes(), []
    older = wishes.turn("me")
    older.__enter__()

    def newer(who: str) -> None:
        with wishes.turn(who):
            shown.append(who)

    waiting = threading.Thread(target=newer, args=("me",))
    waiting.start()
    newer("you")
    waiting.join(0.1)
    assert shown == ["you"]
    older.__exit__(None, None, None)
    waiting.join()
    assert shown == ["you", "me"]
    monkeypatch.setattr(form, "LONGEST_TURN", 0.05)
    wishes.turn("gone").__enter__()
    newer("gone")
    assert shown == ["you", "me", "gone"], "a drawing that never ends is not waited for"
