"""`AudioPipeline`: words become sound, the same however they are streamed, and more words may follow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import millstream as ms
from millstream.pipelines import assets
from millstream.pipelines.audio import AudioPipeline
from millstream.pipelines.speech_draw import speak
from millstream.streaming import JitterBuffer, Snapshot, step_together

TEXT = "He sat on the old mat by 5:30, as it was so hot; and so on."


@pytest.fixture(scope="module")
def pipe(speech_folder: Path) -> AudioPipeline:
    return AudioPipeline.from_pretrained(speech_folder)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def heard(session: ms.Session) -> torch.Tensor:
    return torch.cat([*session, *(chunk.data for chunk in session.flush())], dim=1)


def test_a_call_gives_a_waveform(pipe: AudioPipeline) -> None:
    out = pipe("hello there", voice="bob", generator=seeded())
    assert isinstance(out.audios, np.ndarray)
    assert out.audios.dtype == np.float32
    assert out.audios.shape[0] == 1
    assert out.audios.shape[1] % pipe.codec.hop == 0
    assert out.sampling_rate == pipe.sampling_rate == pipe.codec.sample_rate
    assert np.isfinite(out.audios).all()
    assert 0 < np.abs(out.audios).max() <= 1
    sound, rate = pipe("hello there", voice="bob", generator=seeded(), output_type="pt", return_dict=False)
    assert rate == out.sampling_rate
    assert torch.equal(sound, torch.from_numpy(out.audios))


def test_same_seed_same_samples_and_another_seed_or_voice_others(pipe: AudioPipeline) -> None:
    first = pipe("hello there", voice="ann", generator=seeded()).audios
    assert np.array_equal(first, pipe("hello there", generator=seeded()).audios)  # ann is the first voice
    for other in (pipe("hello there", generator=seeded(1)), pipe("hello there", voice="bob", generator=seeded())):
        assert first.shape != other.audios.shape or not np.allclose(first, other.audios, atol=1e-4)


def test_streamed_chunks_are_80_ms_and_equal_the_whole(pipe: AudioPipeline) -> None:
    whole = pipe(TEXT, generator=seeded(), output_type="pt").audios
    with pipe.stream(TEXT, generator=seeded()) as session:
        chunks = [*session.chunks(), *session.flush()]
    assert {chunk.data.shape[1] for chunk in chunks[1:-2]} == {round(0.08 * pipe.sampling_rate)}
    assert [chunk.start for chunk in chunks] == np.cumsum([0, *(chunk.data.shape[1] for chunk in chunks[:-1])]).tolist()
    torch.testing.assert_close(torch.cat([chunk.data for chunk in chunks], dim=1), whole, atol=1e-5, rtol=0)


def test_one_phrase_is_what_the_speaking_model_says(pipe: AudioPipeline) -> None:
    seed = int(torch.randint(2**63 - 1, (), generator=seeded()))
    said = speak(pipe.parts, "hello there my friend", "ann", seed=seed)
    late = getattr(pipe.codec, "delay", 0)
    whole = pipe("hello there my friend", generator=seeded(), output_type="pt").audios[0]
    torch.testing.assert_close(whole[: len(said) - late], said[late:], atol=1e-5, rtol=0)


def test_numbers_and_abbreviations_are_read_out(pipe: AudioPipeline) -> None:
    spelt = "doctor smith paid three dollars and fifty cents"
    assert np.array_equal(
        pipe("Dr. Smith paid $3.50", generator=seeded()).audios, pipe(spelt, generator=seeded()).audios
    )


def test_text_may_be_appended_while_it_speaks(pipe: AudioPipeline) -> None:
    with pipe.stream("hello there", generator=seeded()) as session:
        first = [*session.step(), *session.step()]
        session.steer(text="one more thing")
        session.steer(text="and another")
        rest = [*session.chunks()]
        assert session.ended
        alone = pipe("hello there", generator=seeded()).audios.shape[1]
        assert sum(chunk.data.shape[1] for chunk in [*first, *rest]) > alone
        ended = session.state.given
        session.steer(text="now I go on")
        assert not session.ended
        again = list(session.chunks())
        assert again[0].start == ended
    with pipe.stream("hello there", generator=seeded()) as session:
        session.steer(text="my friend")  # before it has begun: one text
        together = heard(session)
    assert torch.equal(together, pipe("hello there my friend", generator=seeded(), output_type="pt").audios)


def test_a_new_voice_speaks_what_follows(pipe: AudioPipeline) -> None:
    with pipe.stream("hello there", voice="ann", generator=seeded()) as session:
        list(session.chunks())
        assert session.state.voice == "ann"
        session.steer(text="hello there", voice="bob")
        list(session.chunks())
        assert session.state.voice == "bob"


def test_snapshot_restore_and_fork_go_on_alike(pipe: AudioPipeline, tmp_path: Path) -> None:
    with pipe.stream(TEXT, generator=seeded()) as session:
        for _ in range(5):
            session.step()
        session.steer(text="and more")
        saved = session.snapshot().save(tmp_path / "moment.safetensors")
        twin = session.fork()
        rest = heard(session)
        assert torch.equal(rest, heard(twin))
        session.restore(Snapshot.load(saved))
        assert torch.equal(rest, heard(session))
        twin.close()
    with pytest.raises(ValueError, match="not the snapshot of speech"):
        pipe.load({"frame": 3})
    leaves = Snapshot.load(saved).leaves
    with pytest.raises(ValueError, match="damaged: seed is a str"):
        pipe.load({**leaves, "seed": "7"})
    with pytest.raises(ValueError, match=r"damaged: it lacks cache\.k"):
        pipe.load({name: value for name, value in leaves.items() if name != "cache.k"})


def test_a_saved_voice_speaks(pipe: AudioPipeline, tmp_path: Path) -> None:
    path = pipe.save_voice(tmp_path / "bob.safetensors", voice="bob", generator=seeded(3))
    spoken = pipe("hello there", voice=path, generator=seeded())
    assert np.array_equal(spoken.audios, pipe("hello there", voice=str(path), generator=seeded()).audios)
    plain = pipe("hello there", voice="bob", generator=seeded()).audios
    size = min(plain.shape[1], spoken.audios.shape[1])
    assert not np.allclose(plain[:, :size], spoken.audios[:, :size], atol=1e-4)  # it remembers what it said
    with pipe.stream("hello", voice=path) as session:
        assert session.step()[0].start == 0
        assert session.state.voice == "bob"
    with pytest.raises(ValueError, match=r"a \.safetensors file, got 'bob.pt'"):
        pipe.save_voice(tmp_path / "bob.pt")
    with pytest.raises(FileNotFoundError, match="no snapshot file"):
        pipe("hello", voice="nobody.safetensors")


def test_sessions_step_together_as_alone(pipe: AudioPipeline) -> None:
    alone = [pipe(text, generator=seeded(seed), output_type="pt").audios for seed, text in enumerate(("hello", TEXT))]
    sessions = [pipe.stream(text, generator=seeded(seed)) for seed, text in enumerate(("hello", TEXT))]
    sounds: list[list[torch.Tensor]] = [[], []]
    while not all(session.ended for session in sessions):
        for sound, chunks in zip(sounds, step_together(sessions)):
            sound += [chunk.data for chunk in chunks]
    for whole, sound, session in zip(alone, sounds, sessions):
        sound += [chunk.data for chunk in session.flush()]
        assert torch.equal(torch.cat(sound, dim=1), whole)
        session.close()


def test_memory_stays_and_nothing_runs_dry(pipe: AudioPipeline) -> None:
    """A listener who takes each chunk's worth as soon as it is there hears no gap over many phrases."""
    buffer = JitterBuffer(pipe.sampling_rate, lead=0.08)
    block = round(0.08 * pipe.sampling_rate)
    with pipe.stream(TEXT, generator=seeded()) as session:
        session.step()
        size = session.state.cache.bytes + session.state.codec.bytes
        for number in range(60):
            if number % 10 == 0:
                session.steer(text=TEXT)
            for chunk in session.step():
                buffer.write(chunk.data)
            if len(buffer) >= 2 * block:
                buffer.read(block)
        assert session.state.cache.bytes + session.state.codec.bytes == size
        assert len(session.state.waiting) < 10 * len(TEXT)
    assert buffer.underruns == 0
    assert buffer.played > 50 * block


@pytest.mark.parametrize(
    ("text", "voice", "message"),
    [
        ("", None, "the text is empty; give something to say"),
        ("  \n", None, "the text is empty"),
        ("…!? 日本", None, "nothing to say: give English words or numbers"),
        ("a" * 10_000, None, "10,000 characters; at most 5,000 are read at once, so append the rest while it speaks"),
        ("hello", "kal16", "voice must be one of ann, bob, got 'kal16'"),
        ("hello", "../etc/passwd", "voice must be one of ann, bob"),
    ],
)
def test_what_cannot_be_spoken_is_told_in_a_sentence(
    pipe: AudioPipeline, text: str, voice: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as told:
        pipe(text, voice=voice)
    assert "\n" not in str(told.value)


def test_what_waits_is_limited(pipe: AudioPipeline) -> None:
    with pipe.stream("hello", generator=seeded()) as session:
        with pytest.raises(ValueError, match="append the rest"):
            session.steer(text="a " * 2498)
        assert sum(chunk.data.shape[1] for chunk in session.chunks()) > 0  # nothing has changed
        with pytest.raises(ValueError, match="must be one of ann, bob"):
            session.steer(text="hello", voice="saved.safetensors")  # files are for the owner of the process
        with pytest.raises(TypeError, match="text must be a string, got int"):
            session.steer(text=3)


def test_output_type_is_checked(pipe: AudioPipeline) -> None:
    with pytest.raises(ValueError, match="output_type must be np or pt, got 'pil'"):
        pipe("hello", output_type="pil")  # type: ignore[arg-type]


def test_a_copy_without_the_speaking_model_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(assets, "ASSETS", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="this copy of millstream has no speaking model") as told:
        ms.AudioPipeline.from_pretrained("speech")
    assert "\n" not in str(told.value)


def test_a_shipped_model_is_found_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, speech_folder: Path
) -> None:
    (tmp_path / "speech").symlink_to(speech_folder)
    monkeypatch.setattr(assets, "ASSETS", tmp_path)
    assert ms.AudioPipeline.from_pretrained("speech").voices == ("ann", "bob")


def test_reset_is_silence(pipe: AudioPipeline) -> None:
    with pipe.stream("hello there", generator=seeded()) as session:
        session.step()
        session.steer(text="never said")
        session.reset()
        assert list(session.chunks()) == []
        session.steer(text="hello")
        assert next(session.chunks()).start == 0
