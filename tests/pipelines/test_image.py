"""Pictures from words, with small random weights: seeds, batches, previews, holes, saving, refusals."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import millstream as ms
from millstream.models.text_encoder import ByteTextEncoder
from millstream.models.token_config import Kind
from millstream.models.token_transformer import TokenTransformer
from millstream.models.vq_codec import VQAutoencoder
from millstream.pipelines.image import ImagePipeline
from millstream.samplers import TokenSampler

SIDE, V = 4, 40


def pipeline(kind: Kind = "two_pass", **sampler: Any) -> ImagePipeline:
    torch.manual_seed(0)
    transformer = TokenTransformer(
        kind=kind,
        vocab_size=V,
        grid=(SIDE, SIDE),
        dim=32,
        num_heads=2,
        ffn_dim=48,
        num_layers=2,
        num_cross_layers=2 if kind == "two_pass" else 0,
        text_dim=16,
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    codec = VQAutoencoder(
        sample_size=16, codebook_size=V, latent_channels=4, widths=(8, 16), encoder_blocks=(1, 1), decoder_blocks=(1, 1)
    )
    words = ByteTextEncoder(dim=16, tokens=4, layers=1, max_bytes=32)
    pipe = ImagePipeline(
        transformer.eval(), codec.eval(), words.eval(), TokenSampler(**{"num_inference_steps": 5, **sampler})
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> ImagePipeline:
    return pipeline()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_draws_as_diffusers_pipelines_do(pipe: ImagePipeline) -> None:
    pictures = pipe("a red apple", num_images_per_prompt=3, generator=seeded(0)).images
    assert [picture.size for picture in pictures] == [(16, 16)] * 3
    assert len({picture.tobytes() for picture in pictures}) == 3
    (array,) = pipe(["an apple", "a pear"], output_type="np", return_dict=False)
    assert array.shape == (2, 16, 16, 3)
    assert pipe("x", output_type="latent").images.shape == (1, SIDE * SIDE)


def test_the_same_seed_gives_the_same_picture_and_words_matter(pipe: ImagePipeline) -> None:
    def drawn(prompt: str, seed: int) -> Tensor:
        return pipe(prompt, generator=seeded(seed), output_type="latent").images

    assert torch.equal(drawn("an apple", 3), drawn("an apple", 3))
    assert not torch.equal(drawn("an apple", 3), drawn("an apple", 4))
    assert not torch.equal(drawn("an apple", 3), drawn("a zebra", 3))


@pytest.mark.parametrize("order", ["random", "masked", "raster"])
def test_a_picture_does_not_depend_on_what_is_drawn_with_it(pipe: ImagePipeline, order: Any) -> None:
    given: dict[str, Any] = {"order": order, "output_type": "latent"}
    alone = pipe("an apple", generator=seeded(1), **given).images
    several = pipe("an apple", num_images_per_prompt=3, generator=seeded(1), **given).images
    assert torch.equal(several[:1], alone)
    mixed = pipe(["a pear", "an apple"], generator=[seeded(9), seeded(1)], **given).images
    assert torch.equal(mixed[1:], alone)


def test_the_picture_appears_step_by_step(pipe: ImagePipeline) -> None:
    steps = list(pipe.stream("an apple", generator=seeded(0)))
    assert [step.step for step in steps] == list(range(5))
    decided = [int(step.known.sum()) for step in steps]
    assert decided == sorted(decided)
    assert decided[-1] == SIDE * SIDE
    for before, after in pairwise(steps):
        assert torch.equal(before.tokens[before.known], after.tokens[before.known])
    first = steps[0].preview()
    cells = torch.nn.functional.avg_pool2d(first, 4)
    assert int((cells.amin(dim=1) < 1).sum()) == decided[0], "open places are white"
    whole = pipe("an apple", generator=seeded(0), output_type="pt").images
    assert torch.equal(steps[-1].preview(), whole)


def test_a_callback_sees_every_step(pipe: ImagePipeline) -> None:
    seen: list[tuple[int, int, torch.Size]] = []

    def watch(_: ImagePipeline, step: int, decided: int, kwargs: dict[str, Any]) -> None:
        seen.append((step, decided, kwargs["preview"].shape))

    pipe("an apple", num_images_per_prompt=2, callback_on_step_end=watch)  # type: ignore[arg-type]
    assert [step for step, _, _ in seen] == list(range(5))
    assert seen[-1] == (4, 16, torch.Size([2, 3, 16, 16]))


def as_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy())


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "pil": as_pil,
    "uint8": lambda picture: (picture.permute(1, 2, 0) * 255).byte().numpy(),
    "float": lambda picture: picture.permute(1, 2, 0).numpy(),
    "tensor": lambda picture: picture,
}


@pytest.mark.parametrize("form", FORMS)
def test_painting_into_a_picture_keeps_what_is_outside_the_hole(pipe: ImagePipeline, form: str) -> None:
    picture = torch.rand(3, 16, 16, generator=seeded(5))
    mask = torch.zeros(16, 16)
    mask[4:9, 6:12] = 1
    given: dict[str, Any] = {"image": FORMS[form](picture), "mask_image": mask, "output_type": "pt"}
    painted = pipe("an apple", num_images_per_prompt=2, generator=seeded(0), **given).images
    outside = mask == 0
    assert (painted - picture)[:, :, outside].abs().max() < 1 / 250
    assert (painted - picture)[:, :, mask == 1].abs().max() > 0.05
    tokens = pipe("an apple", **{**given, "output_type": "latent"}).images
    # Rows 1-2 and columns 1-2 of the 4 x 4 grid are touched; the others keep their tokens.
    kept = torch.ones(4, 4, dtype=torch.bool)
    kept[1:3, 1:3] = False
    holed = picture.masked_fill(mask == 1, 1.0)
    assert torch.equal(tokens[0][kept.flatten()], pipe.codec.encode(holed[None])[0][kept.flatten()])


def test_what_the_hole_hid_does_not_leak(pipe: ImagePipeline) -> None:
    picture, mask = torch.rand(3, 16, 16, generator=seeded(5)), torch.zeros(16, 16)
    mask[4:9, 6:12] = 1
    other = torch.where(mask == 1, 1 - picture, picture)
    one, two = (
        pipe("x", image=p, mask_image=mask, generator=seeded(0), output_type="pt").images for p in (picture, other)
    )
    assert torch.equal(one, two)


def test_transparency_is_painted_out(pipe: ImagePipeline) -> None:
    canvas = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    canvas.paste(Image.new("RGBA", (16, 16), (10, 200, 30, 255)), (8, 8))
    painted = np.asarray(pipe("grass", image=canvas, generator=seeded(0)).images[0])
    assert np.abs(painted[5:11, 5:11].astype(int) - (10, 200, 30)).max() <= 2
    assert np.abs(painted[:3].astype(int) - (10, 200, 30)).max() > 20


@pytest.mark.parametrize("mode", ["P", "L", "1", "LA"])
def test_every_kind_of_file_is_read(pipe: ImagePipeline, mode: str) -> None:
    picture = Image.new("RGB", (16, 16), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 16, 8))
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 12, 16, 16))
    given = {"image": picture.convert(mode), "mask_image": mask.convert("P")}
    painted = pipe("x", output_type="np", **given).images[0]
    assert painted[:8].max() < 0.02
    assert painted[8:12].min() > 0.98


def test_a_picture_without_a_hole_comes_back(pipe: ImagePipeline) -> None:
    picture = torch.rand(3, 16, 16)
    same = pipe("x", image=picture, mask_image=torch.zeros(16, 16), output_type="pt").images
    torch.testing.assert_close(same[0], picture)


@pytest.mark.parametrize(("kind", "orders"), [("masked", ["masked", "random", "raster"]), ("causal", ["raster"])])
def test_other_kinds_of_transformer_draw_too(kind: Kind, orders: list[Any]) -> None:
    pipe = pipeline(kind)
    for order in [*orders, None]:
        assert pipe("an apple", order=order, output_type="latent").images.shape == (1, 16)
    if kind == "causal":
        with pytest.raises(ValueError, match='draws in order "raster" alone'):
            pipe("x", order="random")
        with pytest.raises(ValueError, match="cannot draw into a picture"):
            pipe("x", image=torch.rand(3, 16, 16), mask_image=torch.eye(16))


@pytest.mark.parametrize("hole", [False, True])
def test_a_masked_model_can_keep_what_was_decided(monkeypatch: pytest.MonkeyPatch, hole: bool) -> None:
    """refresh=1 is a call without it; more computes fewer tokens, and what comes out is near."""
    pipe = pipeline("masked", num_inference_steps=8)
    mask = torch.ones(16, 16)
    mask[:4] = 0
    given: dict[str, Any] = {"num_images_per_prompt": 8, "output_type": "latent"}
    given |= {"image": torch.rand(3, 16, 16, generator=seeded(5)), "mask_image": mask} if hole else {}
    computed: list[int] = []
    predict = pipe.transformer.predict_masked

    def counted(*inputs: Any) -> Tensor:
        computed.append(inputs[3].shape[1])
        return predict(*inputs)

    monkeypatch.setattr(pipe.transformer, "predict_masked", counted)
    drawn = {refresh: pipe("an apple", refresh=refresh, generator=seeded(0), **given).images for refresh in (1, 2, 8)}
    every, half, once = computed[:8], computed[8:16], computed[16:]
    assert every == [16] * 8
    assert half[::2] == [16] * 4, "every second step computes everything"
    assert sum(once) < sum(half) < sum(every)
    assert torch.equal(drawn[1], pipe("an apple", generator=seeded(0), **given).images)
    share = [float((drawn[refresh] == drawn[1]).float().mean()) for refresh in (2, 8)]
    assert min(share) > 0.9
    assert share[1] < 1, "a test that sees no error sees nothing"


def test_guidance_is_a_batch_of_two_and_none_is_one(pipe: ImagePipeline) -> None:
    one = pipe("an apple", guidance_scale=1.0, generator=seeded(2), output_type="latent").images
    same = pipe("an apple", guidance_scale=5.0, negative_prompt="an apple", generator=seeded(2), output_type="latent")
    assert torch.equal(one, same.images), "guidance away from the prompt itself is none"
    led = pipe("an apple", guidance_scale=5.0, generator=seeded(2), output_type="latent").images
    assert not torch.equal(one, led)


def test_saved_pipelines_load(tmp_path: Path, pipe: ImagePipeline) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = ms.ImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    wanted = pipe("an apple", generator=seeded(0), output_type="latent").images
    assert torch.equal(loaded("an apple", generator=seeded(0), output_type="latent").images, wanted)


def test_a_thin_mask_does_not_vanish(pipe: ImagePipeline) -> None:
    mask = torch.zeros(256, 256)
    mask[100:102] = 1
    (picture,) = pipe("x", image=torch.ones(3, 16, 16), mask_image=mask, output_type="pt", generator=seeded(0)).images
    changed = (picture != 1).any(0).any(1)
    assert changed[6]
    assert changed.sum() == 1


def test_half_precision_draws(pipe: ImagePipeline) -> None:
    half = pipeline().to(torch.bfloat16)
    assert half("an apple", output_type="pt").images.dtype == torch.float32


def test_mistakes_are_told(pipe: ImagePipeline) -> None:
    for error, message, given in [
        (ValueError, "output_type must be pil, np, pt or latent, got 'gif'", {"output_type": "gif"}),
        (ValueError, "num_images_per_prompt must be a whole number of at least 1, got 0", {"num_images_per_prompt": 0}),
        (ValueError, "order must be one of random, masked, raster", {"order": "spiral"}),
        (ValueError, "one for each of the 1 pictures, got 2", {"generator": [seeded(0), seeded(1)]}),
        (ValueError, "give image= too", {"mask_image": torch.zeros(16, 16)}),
        (ValueError, "white where to paint", {"image": torch.rand(3, 16, 16)}),
        (
            ValueError,
            "image must have 3 or 4 channels, got 2",
            {"image": torch.rand(2, 8, 8), "mask_image": torch.eye(8)},
        ),
        (ValueError, "image must be a PIL picture", {"image": "cat.png", "mask_image": torch.eye(8)}),
        (ValueError, "in \\[0, 1\\], or uint8, got 0 to 9", {"image": 9 * torch.eye(8), "mask_image": torch.eye(8)}),
        (ValueError, "array of uint8 or floats", {"image": np.zeros((8, 8, 3), int), "mask_image": torch.eye(8)}),
        (TypeError, "negative_prompt must be one text", {"negative_prompt": ["a", "b"]}),
        (ValueError, "guidance_scale must be at least 1", {"guidance_scale": 0.0}),
        (ValueError, "refresh must be a whole number of at least 1, got 0", {"refresh": 0}),
        (ValueError, '"two_pass" one computes no token twice and is exact as it is', {"refresh": 2}),
    ]:
        with pytest.raises(error, match=message):
            pipe("an apple", **given)
    with pytest.raises(TypeError, match="prompt must be a text or a list of texts, got 3"):
        pipe(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trained together"):
        ImagePipeline(pipe.transformer, VQAutoencoder(), pipe.text_encoder, pipe.scheduler)


def test_a_model_that_does_not_ship_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("millstream.pipelines.assets.ASSETS", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="millstream train emoji-data"):
        ImagePipeline.from_pretrained("emoji")
