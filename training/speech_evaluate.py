"""Measure a speaking model: does a recogniser that never heard it understand it as well as it understands flite?

    millstream train speech-evaluate --model runs/speech-packed --out runs/speech-evaluation

The judge is pocketsphinx with the general English model of its package. Sentences are held out from training, of words
that the judge knows and that are not rare. Each is spoken three times: by flite, by flite through the codec, and by the
model. Writes `report.json` and a few sentences of each as WAV files. With `--generator` a model of `sound-tokens` or
`sound-infill` speaks instead, with the codec and the durations of the speaking model. `--codec-only FOLDER` judges a
codec before anything speaks through it: flite, and flite through the codec.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import time
import wave
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.audio_codec import AudioCodec
from ..pipelines.sound_speak import load_generator, speak_with
from ..pipelines.speech_draw import speak
from . import flite
from .speech_pack import load_parts
from .speech_text import WORDNET, easy, read_sentences, split, words

SILENCE = 4000  # samples before and after what the judge hears
KEPT = 8  # sentences that are written as WAV files


def edit_distance(true: Sequence[str], heard: Sequence[str]) -> int:
    """Least number of words to put in, leave out or change."""
    row = list(range(len(heard) + 1))
    for number, wanted in enumerate(true, 1):
        new = [number]
        for place, got in enumerate(heard):
            new.append(min(row[place] + (wanted != got), row[place + 1] + 1, new[-1] + 1))
        row = new
    return row[-1]


def known_words() -> frozenset[str]:
    """What the recogniser has in its dictionary. ImportError if it is not installed."""
    try:
        from pocketsphinx import get_model_path
    except ImportError as error:
        raise ImportError('the recogniser is missing: pip install "millstream[train]"') from error
    lines = Path(get_model_path("en-us/cmudict-en-us.dict")).read_text(encoding="utf-8").splitlines()
    return frozenset(line.split()[0] for line in lines)


def recognise(samples: np.ndarray) -> list[str]:
    """Words heard in int16 samples at 16 kHz."""
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=float(flite.SAMPLE_RATE), loglevel="FATAL")
    hiss = np.random.default_rng(0).integers(-3, 4, len(samples) + 2 * SILENCE).astype(np.int16)
    hiss[SILENCE:-SILENCE] += samples
    decoder.start_utt()
    decoder.process_raw(hiss.tobytes(), no_search=False, full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return [] if found is None else [re.sub(r"\(\d+\)", "", word) for word in found.hypstr.split()]


Speaker = Callable[..., torch.Tensor]
"""(text, voice, seed=) to a waveform [S]."""


@torch.no_grad()
def through(codec: AudioCodec, samples: np.ndarray) -> torch.Tensor:
    """The waveform [S] of int16 samples [S] after `codec`, no longer late."""
    waveform = torch.from_numpy(samples).float()[None, None] / 32768
    made = codec.decode(codec.encode(torch.nn.functional.pad(waveform, (0, codec.delay))))
    return made[0, 0, codec.delay :][: len(samples)]


def tell(
    number: int,
    *,
    sentences: Sequence[str],
    voices: Sequence[str],
    codec: AudioCodec,
    speaker: Speaker | None,
    out: Path,
) -> dict:
    """One sentence in all its versions: seconds and what was heard. Without a `speaker`, of the codec alone."""
    torch.set_num_threads(1)
    text, voice = sentences[number], voices[number % len(voices)]
    true = flite.speak(text + ".", voice).samples
    sounds = {"flite": true, "codec": as_samples(through(codec, true))}
    begun = time.perf_counter()
    if speaker is not None:
        sounds["model"] = as_samples(speaker(text + ".", voice, seed=number))
    took = time.perf_counter() - begun
    for name, samples in sounds.items():
        if number < KEPT:
            write_wav(out / f"{number}-{voice}-{name}.wav", samples)
    told = {name: " ".join(recognise(samples)) for name, samples in sounds.items()}
    wrong = {name: edit_distance(words(text), heard.split()) for name, heard in told.items()}
    seconds = {name: round(len(samples) / flite.SAMPLE_RATE, 2) for name, samples in sounds.items()}
    return {"text": text, "voice": voice, "told": told, "wrong": wrong, "seconds": seconds, "took": round(took, 3)}


def as_samples(waveform: torch.Tensor) -> np.ndarray:
    """[S] in [-1, 1] to int16."""
    return (waveform.float().clamp(-1, 1) * 32767).round().to(torch.int16).numpy()


def write_wav(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(flite.SAMPLE_RATE)
        file.writeframes(samples.tobytes())


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Word error rates, of all and of each voice, and, if it spoke, the model's real-time factor on one thread."""
    names = list(rows[0]["wrong"])

    def rate(some: Sequence[dict[str, Any]]) -> dict[str, float]:
        total = sum(len(words(row["text"])) for row in some)
        return {name: round(sum(row["wrong"][name] for row in some) / total, 4) for name in names}

    voices = sorted({row["voice"] for row in rows})
    found = {
        "sentences": len(rows),
        "words": sum(len(words(row["text"])) for row in rows),
        "word_error_rate": rate(rows),
        "by_voice": {voice: rate([row for row in rows if row["voice"] == voice]) for voice in voices},
    }
    if "model" not in names:
        return found
    seconds = sum(row["seconds"]["model"] for row in rows)
    return found | {
        "length_against_flite": round(seconds / sum(row["seconds"]["flite"] for row in rows), 3),
        "real_time_factor": round(sum(row["took"] for row in rows) / seconds, 3),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="millstream train speech-evaluate", description=(__doc__ or "").split("\n", 1)[0]
    )
    judged = parser.add_mutually_exclusive_group(required=True)
    judged.add_argument("--model", type=Path, help="the folder of speech-pack")
    judged.add_argument("--codec-only", type=Path, metavar="FOLDER", help="of a codec that is judged alone")
    parser.add_argument("--generator", type=Path, help="folder of sound-tokens or sound-infill that speaks instead")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report and the WAV files")
    parser.add_argument("--text", type=Path, default=WORDNET, help="WordNet's folder, or a file of sentences")
    parser.add_argument("--count", type=int, default=200, help="sentences (default: 200)")
    parser.add_argument("--voices", nargs="+", default=["slt", "rms", "awb", "kal"], help="taken in turn")
    parser.add_argument("--processes", type=int, help="one per core by default")
    arguments = parser.parse_args(argv)
    everything = read_sentences(arguments.text)
    if arguments.codec_only and arguments.generator:
        parser.error("--generator speaks with a --model; leave it out with --codec-only")
    sentences = easy(split(everything)[1], everything, known_words(), arguments.count)
    speaker = None
    if arguments.codec_only:
        codec = AudioCodec.from_pretrained(arguments.codec_only, torch_dtype=torch.float32).eval()
    else:
        parts = load_parts(arguments.model)
        codec, speaker = parts.codec, partial(speak, parts)
        if arguments.generator:
            speaker = partial(speak_with, parts, load_generator(arguments.generator))
    arguments.out.mkdir(parents=True, exist_ok=True)
    work = partial(tell, sentences=sentences, voices=arguments.voices, codec=codec, speaker=speaker, out=arguments.out)
    torch.set_num_threads(1)  # before the fork, whose children would wait for threads that are not there
    with multiprocessing.get_context("fork").Pool(arguments.processes or os.cpu_count()) as pool:
        rows = pool.map(work, range(len(sentences)), chunksize=1)
    report = {
        "model": str(arguments.generator or arguments.model or arguments.codec_only),
        "judge": "pocketsphinx, en-us",
        **summary(rows),
        "rows": rows,
    }
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in report.items() if name != "rows"}, indent=1))


if __name__ == "__main__":
    main()
