"""The recipe of pictures from words, from an archive to an evaluated folder, on pictures made here."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from millstream.models.text_encoder import ByteTextEncoder
from millstream.models.token_transformer import TokenTransformer
from millstream.models.vq_codec import VQAutoencoder
from millstream.pipelines.image import ImagePipeline
from millstream.training import emoji, emoji_codec, emoji_data, emoji_evaluate, emoji_pack
from millstream.training.emoji_data import Emojis
from millstream.training.emoji_recognizer import accuracy, train_recognizer
from millstream.training.emoji_words import (
    FILLERS,
    SEEN,
    UNSEEN,
    frame,
    phrase,
    seen_pairs,
    unseen_pairs,
    unseen_phrase,
    with_article,
)
from millstream.training.trainer import Budget

COLOURS = {
    "red square": (220, 30, 30),
    "green square": (30, 190, 60),
    "blue square": (40, 60, 220),
    "moon": (240, 220, 90),
}


def squares(size: int = 16) -> Emojis:
    """One coloured shape per name."""
    pictures = torch.full((len(COLOURS), size, size, 3), 255, dtype=torch.uint8)
    for index, (name, colour) in enumerate(COLOURS.items()):
        side = slice(3, 13) if name.endswith("square") else slice(6, 10)
        pictures[index, side, side] = torch.tensor(colour, dtype=torch.uint8)
    keywords = tuple((*name.split(), "shape") for name in COLOURS)
    return Emojis(pictures, tuple(COLOURS), keywords, torch.arange(4), torch.zeros(4, dtype=torch.bool))


def webp(colour: tuple[int, int, int, int], size: tuple[int, int] = (20, 24)) -> bytes:
    data = io.BytesIO()
    Image.new("RGBA", size, colour).save(data, "WEBP", lossless=True)
    return data.getvalue()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """What npm makes, in small: an apple, a hand in two skin tones and none, a picture that no one knows."""
    path = tmp_path / "pictures.tgz"
    names = ("1f34e", "1f44b", "1f44b-1f3fb", "1f44b-1f3ff", "2764-fe0f", "10ffff")
    with tarfile.open(path, "w:gz") as files:
        for number, name in enumerate(names):
            data = webp((40 * number, 10, 20, 255 if number else 0))
            info = tarfile.TarInfo(f"package/assets/{name}.webp")
            info.size = len(data)
            files.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def cldr(tmp_path: Path) -> Path:
    for folder, line in (
        (
            "annotations",
            '<annotation cp="🍎">apple | fruit | red</annotation><annotation cp="🍎" type="tts">x</annotation>',
        ),
        ("annotationsDerived", '<annotation cp="👋">hand | wave | hello</annotation>'),
    ):
        (tmp_path / folder).mkdir()
        text = f"<ldml><annotations>{line}</annotations></ldml>"
        (tmp_path / folder / "en.xml").write_text(text, encoding="utf-8")
    return tmp_path


def test_pictures_meet_their_names(archive: Path, cldr: Path, tmp_path: Path) -> None:
    pytest.importorskip("emoji")
    out = tmp_path / "made" / "emoji.safetensors"
    emoji_data.main(["--archive", str(archive), "--cldr", str(cldr), "--out", str(out), "--size", "8"])
    data = Emojis.open(out)
    assert dict(zip(data.names, data.keywords)) == {
        "red heart": (),
        "red apple": ("apple", "fruit", "red"),
        "waving hand": ("hand", "wave", "hello"),
        "waving hand light skin tone": ("hand", "wave", "hello"),
        "waving hand dark skin tone": ("hand", "wave", "hello"),
    }
    number = {name: index for index, name in enumerate(data.names)}
    assert (data.pictures[number["red apple"]] == 255).all(), "transparent is white"
    assert data.pictures[number["waving hand"]][4, 4].tolist() == [40, 10, 20]
    hands = [index for name, index in number.items() if "hand" in name]
    assert len(set(data.groups[hands].tolist())) == 1
    weights = dict(zip(data.names, data.weights.tolist()))
    assert weights["waving hand"] == pytest.approx(weights["red apple"])
    assert weights["waving hand dark skin tone"] == pytest.approx(weights["red apple"] / 2)


def test_missing_sources_name_the_way_out(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("emoji")
    with pytest.raises(FileNotFoundError, match="unicode-cldr-core"):
        emoji_data.collect(archive, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="millstream train emoji-data"):
        Emojis.open(tmp_path / "nothing.safetensors")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="npm pack"):
        emoji_data.fetch(tmp_path)


def test_held_out_phrasings_are_never_trained_on() -> None:
    keywords = ("apple", "fruit", "red", "food", "sweet")
    chance = random.Random(0)
    trained = {phrase("red apple", keywords, chance) for _ in range(3000)}
    held_out = {unseen_phrase("red apple", chance) for _ in range(100)}
    assert len(trained) > 30
    assert not trained & held_out
    assert len(held_out) == len(UNSEEN)
    assert not set(seen_pairs(keywords)) & set(unseen_pairs(keywords))
    assert unseen_pairs(keywords), "choose keywords of which a pair is held out"
    for first, second in unseen_pairs(keywords):
        for joint in (" ", ", ", " and "):
            assert not {f"{first}{joint}{second}", f"{second}{joint}{first}"} & trained


def test_every_held_out_sentence_has_words_that_training_lacks() -> None:
    trained = {word.strip(",") for pair in SEEN for side in pair for word in side.split()} | set(FILLERS)
    for sentence in UNSEEN:
        words = set(sentence.format(name="", a_name="").replace(",", "").replace("?", "").split())
        assert words - trained, sentence


def test_prompts_are_joined_as_if_they_were_one_text() -> None:
    encoder = ByteTextEncoder(dim=8, tokens=1, layers=1, heads=1, max_bytes=24)
    rows = [("", "", ""), ("", "red apple", ""), ("draw a", "red apple", "now!"), ("x" * 20, "red apple", "")]
    sides = [encoder.tokenize(list(side)) for side in zip(*rows)]
    wanted = encoder.tokenize([" ".join(row) for row in rows])
    wanted[0, 1:] = 256  # nothing at all becomes one space
    assert torch.equal(emoji.joined(sides), wanted)


def test_idle_words_may_hold_a_name_but_are_none() -> None:
    chance = random.Random(0)
    words = {word for _ in range(500) for side in frame(chance, ["dragon"]) for word in side.split()}
    assert any("dragon" in word for word in words)
    assert "dragon" not in words


def test_articles() -> None:
    assert [with_article(name) for name in ("apple", "red apple", "glasses", "dress", "A button")] == [
        "an apple",
        "a red apple",
        "glasses",
        "a dress",
        "A button",
    ]


def test_moved_pictures_are_mirrored_and_shifted_on_white() -> None:
    torch.manual_seed(0)
    picture = torch.full((8, 8, 3), 255, dtype=torch.uint8)
    picture[3:5, 2:4] = torch.tensor([9, 8, 7], dtype=torch.uint8)
    many = emoji_codec.moved(picture.expand(200, -1, -1, -1))
    unchanged = (many == picture).flatten(1).all(dim=1)
    assert 60 < int(unchanged.sum()) < 140
    assert set(many.unique().tolist()) <= {7, 8, 9, 255}
    assert all(int((one[..., 0] == 9).sum()) <= 4 for one in many)
    assert any((one == picture.flip(1)).all() for one in many)


def test_the_codec_learns_and_says_how_well(tmp_path: Path, on_the_cpu: None, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    net = VQAutoencoder(16, 32, 8, (8, 16), (1, 1), (1, 1))
    before = emoji_codec.psnr(net, squares().pictures)
    budget = Budget(5.0, 150, 5e-3, weight_decay=0.0, warmup_steps=10, ema_decay=0.9)
    emoji_codec.train(net, squares(), budget, tmp_path, batch_size=16, seed=0)
    said = capsys.readouterr().out
    loaded = VQAutoencoder.from_pretrained(tmp_path)
    after = emoji_codec.psnr(loaded, squares().pictures)
    assert f"PSNR over all 4 pictures: {after:.2f} dB" in said
    assert after > before + 5


def test_the_recipe_ends_in_a_model_that_draws_what_it_is_told(tmp_path: Path, on_the_cpu: None) -> None:
    """Four pictures and a small codec: after a short training the drawn tokens are the learnt ones."""
    torch.manual_seed(0)
    codec = VQAutoencoder(16, 32, 8, (8, 16), (1, 1), (1, 1))
    codec.save_pretrained(tmp_path / "codec")
    budget = Budget(5.0, 200, 6e-3, weight_decay=0.0, warmup_steps=10, ema_decay=0.9, muon_scale=0)
    emoji.train(codec, squares(), budget, tmp_path / "model", batch_size=12, seed=0, dim=64, layers=1)
    packed = tmp_path / "packed"
    pack = ["--codec", str(tmp_path / "codec"), "--model", str(tmp_path / "model"), "--out", str(packed)]
    emoji_pack.main([*pack, "--sampler-steps", "8", "--guidance-scale", "2"])
    pipe = ImagePipeline.from_pretrained(packed)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config["guidance_scale"] == 2
    wanted = emoji_codec.encode_all(pipe.codec, squares().pictures)
    for order in ("random", "masked", "raster"):
        generator = torch.Generator().manual_seed(0)
        drawn = pipe(list(COLOURS), order=order, temperature=0.3, generator=generator, output_type="latent").images
        assert float((drawn == wanted).float().mean()) > 0.8, order


def test_recognizer_and_report(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = squares()
    codec = VQAutoencoder(16, 32, 8, (8, 16), (1, 1), (1, 1)).eval()
    net = train_recognizer(data, codec, torch.device("cpu"), steps=40, batch_size=16)
    true = emoji_codec.as_float(data.pictures)
    assert accuracy(net, true, torch.arange(4))["top1"] == 1
    assert accuracy(net, true, torch.tensor([1, 0, 3, 2])) == {"top1": 0, "top5": 1}

    class Oracle:
        """Draws the true picture of the name in the prompt."""

        transformer = TokenTransformer(grid=(4, 4), vocab_size=32, dim=64, num_heads=1)
        scheduler = emoji_pack.TokenSampler()

        def __init__(self) -> None:
            self.codec, self.orders = codec, []

        def __call__(self, prompts: list[str], order: str = "", **_: object) -> object:
            self.orders.append(order)
            index = [next((i for i, n in enumerate(COLOURS) if n in p), 3) for p in prompts]
            return type("Output", (), {"images": true[index]})

    oracle = Oracle()
    report = emoji_evaluate.evaluate(oracle, data, net, count=8, steps=4)  # type: ignore[arg-type]
    assert report["true"]["top1"] == 1
    assert report["random, unseen"]["top1"] == 1
    assert {"codec_psnr", "through_codec", "masked, unseen", "raster, unseen", "random, seen"} <= report.keys()
    emoji_evaluate.write_sheet(oracle, data, tmp_path / "sheet.png")  # type: ignore[arg-type]
    assert np.asarray(Image.open(tmp_path / "sheet.png")).ndim == 3


def test_evaluation_keeps_its_recognizer(tmp_path: Path, on_the_cpu: None, capsys: pytest.CaptureFixture) -> None:
    data, packed, out = tmp_path / "data.safetensors", tmp_path / "packed", tmp_path / "out"
    squares().save(data)
    ImagePipeline(
        TokenTransformer(
            grid=(4, 4), vocab_size=32, dim=64, num_heads=1, num_layers=1, num_cross_layers=1, text_dim=16
        ),
        VQAutoencoder(16, 32, 8, (8, 16), (1, 1), (1, 1)),
        ByteTextEncoder(dim=16, tokens=4, layers=1, max_bytes=32),
        emoji_pack.TokenSampler(num_inference_steps=4),
    ).save_pretrained(packed)
    arguments = ["--model", str(packed), "--data", str(data), "--out", str(out), "--count", "4"]
    emoji_evaluate.main([*arguments, "--recognizer-steps", "5"])
    first = (out / "recognizer.pt").read_bytes()
    emoji_evaluate.main([*arguments, "--recognizer-steps", "5"])
    assert (out / "recognizer.pt").read_bytes() == first
    report = json.loads((out / "report.json").read_text())
    assert report["random, unseen"]["prompts"] == 4
    assert '"codec_psnr"' in capsys.readouterr().out


def test_grids_the_codec_recipe_lacks_are_refused() -> None:
    assert emoji_codec.emoji_codec(64, 16).sides == [16]
    assert emoji_codec.emoji_codec(64, 8).sides == [8]
    with pytest.raises(ValueError, match="a quarter or an eighth of the pictures' 64 pixels, got 32"):
        emoji_codec.emoji_codec(64, 32)


def test_masks_hide_one_token_at_least_and_often_most() -> None:
    torch.manual_seed(0)
    hidden = (~emoji.random_shown(torch.zeros(2000, 16))).sum(dim=1)
    assert int(hidden.min()) == 1
    assert int(hidden.max()) == 16
    assert abs(float(hidden.float().mean()) / 16 - 2 / torch.pi) < 0.03  # the mean of cos


def test_a_masked_model_learns_by_the_same_recipe(tmp_path: Path, on_the_cpu: None) -> None:
    torch.manual_seed(0)
    budget = Budget(5.0, 3, 1e-3, warmup_steps=1, muon_scale=0)
    codec = VQAutoencoder(16, 32, 8, (8, 16), (1, 1), (1, 1))
    emoji.train(codec, squares(), budget, tmp_path, batch_size=4, seed=0, dim=64, layers=1, kind="masked")
    loaded = TokenTransformer.from_pretrained(tmp_path / "transformer")
    assert (loaded.config["kind"], loaded.config["num_layers"], loaded.config["num_cross_layers"]) == ("masked", 2, 0)


def test_orders_are_permutations_and_some_are_the_raster() -> None:
    orders = emoji.random_orders(torch.zeros(300, 9))
    assert torch.equal(orders.sort(dim=1).values, torch.arange(9).expand(300, -1))
    raster: Tensor = (orders == torch.arange(9)).all(dim=1)
    assert 10 < int(raster.sum()) < 60
