"""The recipes of speech, tiny and on made-up sound: they learn, resume, pack and speak."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from millstream.models.audio_codec import AudioCodec
from millstream.models.phonemes import PADDING, token
from millstream.models.pronouncer import Pronouncer
from millstream.models.speech import SpeechTransformer
from millstream.pipelines.speech_draw import SpeechParts, speak, whole_slots
from millstream.samplers import FlowSampler
from millstream.training import speech as recipe
from millstream.training import speech_codec, speech_words
from millstream.training.audio_losses import Judge, MelDistance
from millstream.training.speech_data import Speech
from millstream.training.speech_evaluate import edit_distance, summary
from millstream.training.speech_pack import load_parts, pack
from millstream.training.speech_text import easy, read_sentences, split, spoken
from millstream.training.trainer import Budget, Trainer

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
MODEL = {"latent_channels": 4, "phoneme_dim": 16, "dim": 64, "layers": 1, "ffn_dim": 64, "head_dim": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("speech")
    generator = torch.Generator().manual_seed(0)
    for number, voice in enumerate(("slt", "rms")):
        lengths = torch.randint(400, 3000, (40,), generator=generator)
        ends = lengths.cumsum(0)
        tokens = torch.randint(0, PADDING, (40,), generator=generator).short()
        samples = torch.randint(-3000, 3000, (int(ends[-1]),), generator=generator).short()
        tensors = {"samples": samples, "tokens": tokens, "ends": ends.int(), "natural": torch.ones(40).bool()}
        save_file(tensors, made / f"{number:05d}.safetensors", metadata={"voice": voice})
    return made


@pytest.fixture(scope="module")
def speech(folder: Path) -> Speech:
    return Speech.open(folder, 1280)


def test_shards_are_laid_end_to_end_in_whole_frames(speech: Speech) -> None:
    assert len(speech.samples) == speech.shards[-1]
    assert (speech.shards % 1280 == 0).all()
    assert (speech.ends.diff() >= 0).all()
    assert speech.ends[39] == speech.shards[1]
    assert speech.voices.tolist() == [0, 1]
    with pytest.raises(FileNotFoundError, match="millstream train speech-data --out"):
        Speech.open(Path("/nowhere"), 1280)


def test_latents_of_all_shards_are_those_of_each_alone(speech: Speech) -> None:
    torch.manual_seed(0)
    codec = AudioCodec(**CODEC).eval()
    together = speech_codec.encode_all(codec, speech, frames=5)
    second = speech.samples[speech.shards[1] :]
    alone = codec.encode(speech_codec.as_waveform(second[None]))[0]
    assert torch.allclose(together[:, -alone.shape[1] :].float(), alone, atol=2e-3)
    speech_codec.measure_latents(codec, speech)
    normal = speech_codec.encode_all(codec, speech).float()
    assert torch.allclose(normal.mean(1), torch.zeros(4), atol=0.02)
    assert torch.allclose(normal.std(1), torch.ones(4), atol=0.02)


def test_windows_say_what_sounds_when(speech: Speech) -> None:
    latents = torch.arange(int(speech.shards[-1]) // 1280).expand(4, -1).float()
    batch = recipe.Windows(latents, speech, hop=1280, slots=8, batch_size=6, frames=10)()
    for row in range(6):
        first = int(batch["latents"][row, 0, 1])  # the first frame to be drawn
        slot = (first + torch.arange(10)[:, None]) * 1280 + torch.arange(8) * 160 + 80
        sounds = torch.searchsorted(speech.ends, slot, right=True)
        said = batch["tokens"][row][batch["phoneme"][row]]
        assert torch.equal(said, speech.tokens[sounds].long())
        shard = int(first * 1280 >= speech.shards[1])
        assert batch["voice"][row] == shard
        counted = batch["slots"][row][batch["natural"][row]]
        assert len(counted) == int(sounds.max() - sounds.min()) + 1
    assert batch["elapsed"].min() >= 0
    assert batch["elapsed"].max() <= 1


def test_mel_distance_hears_and_the_judge_learns_apart() -> None:
    distance = MelDistance(16000, ((64, 5), (256, 20)))
    tone = torch.sin(torch.arange(4000) * 0.2)[None, None]
    assert float(distance(tone, tone)) == 0
    assert distance(tone, torch.zeros_like(tone)) > distance(tone, 0.9 * tone) > 0
    judge = Judge((64,), width=4)
    made = tone.clone().requires_grad_()
    learn, fool, match = judge(made, torch.randn_like(tone))
    (fool + match).backward(retain_graph=True)
    assert made.grad is not None
    assert all(parameter.grad is None for parameter in judge.parameters())  # the maker's wish teaches the judge nothing
    made.grad = None
    learn.backward()
    assert made.grad is None
    assert all(parameter.grad is not None for parameter in judge.parameters())


def test_train_resume_pack_and_speak(speech: Speech, folder: Path, tmp_path: Path, capsys) -> None:
    codec = AudioCodec(**CODEC)
    budget = Budget(minutes=5, steps=2, warmup_steps=1, muon_scale=1.0)
    speech_codec.train(codec, speech, budget, tmp_path / "codec", batch_size=2, adversarial=0.0, seed=0)
    assert "envelope" in capsys.readouterr().out
    trained = AudioCodec.from_pretrained(tmp_path / "codec")
    model = SpeechTransformer(**MODEL)
    given = {"batch_size": 2, "seed": 0, "frames": 10}
    recipe.train(model, trained, speech, budget, tmp_path / "model", **given)
    longer = Budget(minutes=5, steps=3, warmup_steps=1)
    again = SpeechTransformer(**MODEL)
    trainer = Trainer(recipe.SpeechObjective(again, 10), longer, tmp_path / "model", Accelerator())
    assert trainer.step == 2
    listed = {"hi": f"{token('hh', begins=True)} {token('ay', True)}"}
    parts = SpeechParts(
        SpeechTransformer.from_pretrained(tmp_path / "model"), trained, Pronouncer(16, 1, listed), FlowSampler(2)
    )
    pack(parts, tmp_path / "packed")
    packed = load_parts(tmp_path / "packed")
    whole, small = (speak(some, "Hi, hi.", "rms", seed=3) for some in (parts, packed))
    assert len(whole) % 1280 == 0
    assert len(whole) > 0
    assert abs(len(small) - len(whole)) <= 1280
    assert torch.equal(small, speak(packed, "Hi, hi.", "rms", seed=3))
    assert not torch.equal(small, speak(packed, "Hi, hi.", "rms", seed=4))


def test_the_pronouncer_learns_and_lists_what_it_does_not(tmp_path: Path) -> None:
    entries = {word: [token("d", begins=True), token("aa", True)] for word in ("da", "do", "dee", "du")}
    counts = Counter({"da": 9, "do": 5})
    budget = Budget(minutes=1, steps=2, warmup_steps=1)
    found = speech_words.train(Pronouncer(16, 1), entries, counts, budget, 4, tmp_path)
    made = Pronouncer.from_pretrained(tmp_path)
    assert made.pronounce(["da", "do"]) == [entries["da"], entries["do"]]  # learnt or listed
    assert set(found) == {"held out", "seen", "exceptions"}


def test_durations_are_rounded_without_drift() -> None:
    rounded = whole_slots(torch.full((1, 9), 2.4), 8)
    assert rounded[0, :-1].sum() == round(8 * 2.4)
    assert float(rounded.sum()) % 8 == 0


def test_sentences_are_split_once_and_for_ever(tmp_path: Path) -> None:
    data = '  1 licence\n00 1 n 01 x 0 | a thing; "the old man sat down"; "it was a good dog, too"\n'
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text(data)
    found = read_sentences(tmp_path)
    assert sorted(found) == ["it was a good dog, too", "the old man sat down"]
    train, held = split([str(n) for n in range(100)])
    assert (len(train), len(held)) == (98, 2)
    assert not set(train) & set(held)
    known = frozenset(["the", "old", "man", "sat", "down"])
    assert easy(found, found * 3, known, 5) == ["the old man sat down"]
    said = {spoken("who is it", ["rare", "words", "are", "here"], random.Random(seed)) for seed in range(99)}
    assert "Who is it?" in said
    assert any("rare" in text for text in said)


def test_word_errors_are_counted() -> None:
    assert edit_distance(["a", "b", "c"], ["a", "x", "c", "d"]) == 2
    assert edit_distance([], ["a"]) == 1
    row = {"text": "one two", "voice": "slt", "wrong": {"flite": 1, "model": 2}, "seconds": {"flite": 1, "model": 2}}
    told = summary([row | {"took": 0.5}])
    assert told["word_error_rate"] == {"flite": 0.5, "model": 1.0}
    assert told["real_time_factor"] == 0.25


def test_flite_says_when_every_sound_ends() -> None:
    from millstream.training import flite

    try:
        said = flite.speak("Hello there, the apple.", "slt")
    except ImportError:
        pytest.skip("libflite1 is not installed")
    assert said.ends[-1] == len(said.samples)
    assert (said.tokens // 4 == 0).sum() == 3  # pauses at both ends and at the comma
    assert flite.pronounce("hello") == said.tokens.tolist()[1:5]
    slow = flite.speak("Hello there, the apple.", "slt", 1.3)
    assert len(slow.samples) == pytest.approx(1.3 * len(said.samples), rel=0.02)
