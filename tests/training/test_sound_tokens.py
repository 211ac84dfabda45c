"""The recipe of the generators over codes, tiny and on made-up sound: it learns, saves, and what it saved draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from millstream.models.audio_codec import AudioCodec
from millstream.models.masked_sound import MaskedSoundTransformer
from millstream.models.phonemes import PADDING, TOKENS, token
from millstream.models.pronouncer import Pronouncer
from millstream.models.speech import SpeechTransformer
from millstream.models.transformer import CausalTransformer3DModel
from millstream.pipelines.sound_frames import FrameStream
from millstream.pipelines.sound_infill import Infill
from millstream.pipelines.sound_speak import load_generator, speak_with
from millstream.pipelines.sound_text import IDS, READ, as_actions, frame_tokens, text_tokens
from millstream.pipelines.sound_tokens import draw_codes
from millstream.pipelines.speech_draw import SpeechParts
from millstream.samplers import Categorical, FlowSampler
from millstream.streaming.kv_cache import Window
from millstream.training import sound_infill as infill
from millstream.training import sound_tokens as recipe
from millstream.training.speech_data import Speech
from millstream.training.trainer import Budget

CODEC = {
    "latent_channels": 4,
    "ratio": 8,
    "bands": 20,
    "encoder_dim": 8,
    "encoder_layers": 1,
    "decoder_dim": 8,
    "decoder_layers": 1,
    "levels": 2,
    "codebook_size": 8,
}


def speech() -> Speech:
    generator = torch.Generator().manual_seed(0)
    frames = 80
    ends = torch.arange(1, 41) * (frames * 1280 // 40)
    return Speech(
        torch.randint(-3000, 3000, (frames * 1280,), generator=generator).short(),
        torch.randint(0, PADDING, (40,), generator=generator).short(),
        ends,
        torch.ones(40, dtype=torch.bool),
        torch.tensor([0, frames * 1280]),
        torch.tensor([1]),
        ("slt", "rms"),
    )


def batch(rows: int = 4, frames: int = 12) -> dict[str, Tensor]:
    """Codes that follow from what is said, level by level."""
    generator = torch.Generator().manual_seed(1)
    said = torch.randint(8, (rows, frames), generator=generator)
    codes = torch.stack([said, (3 * said + 1) % 8], dim=1)
    return {"codes": codes, "condition": said[..., None] + torch.arange(READ + 1) * TOKENS}


def loss_after(objective: torch.nn.Module, steps: int) -> tuple[float, float]:
    optimizer, losses = torch.optim.AdamW(objective.parameters(), 3e-3), []
    torch.manual_seed(0)
    for _ in range(steps):
        loss, _ = objective(batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return sum(losses[:5]) / 5, sum(losses[-5:]) / 5


@pytest.mark.parametrize("kind", ["masked", "frames"])
def test_the_objectives_learn_what_follows_from_what_is_said(kind: str) -> None:
    torch.manual_seed(0)
    model = recipe.make_model(kind, AudioCodec(**CODEC), dim=64, layers=1, chained=2)
    masked = isinstance(model, MaskedSoundTransformer)
    objective = recipe.MaskedObjective(model) if masked else recipe.FramesObjective(model)
    first, last = loss_after(objective, 60)
    assert first > 1.2
    assert last < first / 3
    wanted = batch()
    if masked:
        seeds = torch.arange(4)
        drawn = draw_codes(model, 12, seeds, condition=wanted["condition"], steps=(4,), temperature=0.0)
    else:
        stream = FrameStream(model, 3, Categorical(0.0))
        state = stream.begin(torch.arange(4))
        drawn = torch.cat([stream.step(state, part) for part in wanted["condition"].split(3, dim=1)], dim=2)
    assert float((drawn == wanted["codes"]).float().mean()) > 0.8


@pytest.mark.parametrize("kind", ["masked", "frames"])
def test_train_save_and_draw(kind: str, tmp_path: Path) -> None:
    codec = AudioCodec(**CODEC)
    model = recipe.make_model(kind, codec, dim=64, layers=1, chained=1)
    budget = Budget(minutes=5, steps=2, warmup_steps=1)
    recipe.train(model, codec, speech(), budget, tmp_path, batch_size=2, seed=0, frames=10)
    assert_speaks(tmp_path, type(model), codec)


def assert_speaks(folder: Path, kind: type, codec: AudioCodec) -> None:
    """Loaded from its folder, the generator says a text in as many frames as it takes; seeds and voices differ."""
    parts, loaded, text = speaking(codec), load_generator(folder), "Hi, " * 16 + "hi."
    assert isinstance(loaded, kind)
    condition = text_tokens(parts, text, "rms")
    assert int(condition.max()) < IDS
    sound = speak_with(parts, loaded, text, "rms", seed=3)
    assert sound.shape == (condition.shape[1] * 1280,)
    assert torch.equal(sound, speak_with(parts, loaded, text, "rms", seed=3))
    assert not torch.equal(sound, speak_with(parts, loaded, text, "rms", seed=4))


def test_infilling_learns_under_both_masks_and_draws(tmp_path: Path) -> None:
    """Latents that follow from what is said: one number per frame."""
    torch.manual_seed(0)
    codec = AudioCodec(**CODEC)
    model = infill.make_model(codec, dim=64, layers=1)
    objective = infill.InfillObjective(model, Window(8, 0, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    told = batch(8)["condition"]
    latents = (told[:, None, :, 0] / 3 - 1).expand(-1, 4, -1)
    for _ in range(250):
        loss, _ = objective({"latents": latents, "condition": told})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    fill = Infill(model.eval(), FlowSampler(4), actions=as_actions(told))
    nothing = torch.zeros(8, 12, dtype=torch.bool)
    whole = fill.whole(latents, nothing, torch.arange(8))
    stream = torch.cat(list(fill.blocks(latents, nothing, torch.arange(8), Window(8, 0, 2))), 2)
    for made in (whole, stream):
        assert float((made - latents).square().mean()) < 0.3 * float(latents.var())


@torch.no_grad()
def test_gaps_and_blocks() -> None:
    known, levels = infill.gaps(64, 20, torch.device("cpu"))
    assert bool((~known).all(1).any()), "some clips are drawn whole"
    assert bool((levels == levels[:, :1]).all())
    opened = (~known).long()
    assert int(opened.diff(dim=1).clamp_min(0).sum(1).max()) <= 1, "one gap"
    model = infill.make_model(AudioCodec(**CODEC), dim=64, layers=1)
    known, levels = infill.InfillObjective(model, Window(8, 0, 4)).blocks(64, 18, torch.device("cpu"))
    assert known.shape == levels.shape == (64, 18)
    assert bool((known[:, :4] == known[:, :1]).all())
    assert 0.3 < float(known.float().mean()) < 0.7


def test_infilling_trains_on_speech(tmp_path: Path) -> None:
    codec = AudioCodec(**CODEC)
    budget = Budget(minutes=5, steps=2, warmup_steps=1)
    model = infill.make_model(codec, dim=64, layers=1)
    infill.train(model, codec, speech(), budget, tmp_path, batch_size=2, seed=0, frames=10)
    assert (tmp_path / "checkpoint.pt").is_file()
    assert_speaks(tmp_path, CausalTransformer3DModel, codec)
    with pytest.raises(ValueError, match=r"the folder of one of MaskedSoundTransformer, .*, got no config.json"):
        load_generator(tmp_path / "nowhere")


def speaking(codec: AudioCodec) -> SpeechParts:
    sizes: dict = {"latent_channels": 4, "phoneme_dim": 16, "dim": 64, "layers": 1, "ffn_dim": 64, "head_dim": 32}
    listed = {"hi": f"{token('hh', begins=True)} {token('ay', True)}"}
    return SpeechParts(SpeechTransformer(**sizes), codec, Pronouncer(16, 1, listed), FlowSampler(2))


def test_frames_are_told_what_sounds_in_them_and_by_whom() -> None:
    tokens = torch.tensor([[5, 9, 2]])
    phoneme = torch.tensor([[[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 2, 2, 2]]])
    found = frame_tokens(tokens, phoneme, torch.tensor([1]))[0]
    offsets = TOKENS * torch.arange(READ)
    assert torch.equal(found[0, :READ] - offsets, torch.tensor([5, 9, 9, 9]))
    assert torch.equal(found[1, :READ] - offsets, torch.tensor([9, 2, 2, 2]))
    assert found[:, READ].tolist() == [READ * TOKENS + 1] * 2
