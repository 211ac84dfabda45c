"""Recipe of the speech data: sentences said by flite's voices, with the exact time of every sound.

    millstream train speech-data --out data/speech

Every shard is one voice that speaks on and on: `samples` int16 [S], `tokens` int16 [P], `ends` int32 [P] (the sample at
which each sound is over) and `natural` bool [P] (whether it was said at the voice's own pace). Finished ones are kept.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from .flite import SAMPLE_RATE, VOICES, speak
from .speech_text import WORDNET, read_sentences, split, spoken, words

NATURAL = 0.6  # share of sentences at the voice's own pace; the others teach how to speak faster and slower
LOUDNESS = 0.08  # root mean square of a shard


def make_shard(number: int, *, out: Path, sentences: Sequence[str], vocabulary: Sequence[str], seed: int) -> float:
    """Speak one shard's sentences; returns its seconds."""
    path = out / f"{number:05d}.safetensors"
    if path.is_file():
        return _seconds(path)
    voice = list(VOICES)[number % len(VOICES)]
    chance = random.Random(f"{seed}/{number}")
    parts, natural, offset = [], [], 0
    for sentence in sentences:
        stretch = 1.0 if chance.random() < NATURAL else 2 ** chance.uniform(-0.5, 0.4)
        part = speak(spoken(sentence, vocabulary, chance), voice, stretch)
        parts.append((part.samples, part.tokens, part.ends + offset))
        natural.append(np.full(len(part.tokens), stretch == 1.0))
        offset += len(part.samples)
    samples, tokens, ends = (np.concatenate(column) for column in zip(*parts))
    size = np.sqrt(np.square(samples.astype(np.float32) / 32768).mean())
    loud = np.clip(samples * (LOUDNESS / max(size, 1e-4)), -32768, 32767).astype(np.int16)
    tensors = {"samples": loud, "tokens": tokens, "ends": ends.astype(np.int32), "natural": np.concatenate(natural)}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({name: torch.from_numpy(value) for name, value in tensors.items()}, temporary, metadata={"voice": voice})
    temporary.replace(path)
    return len(samples) / SAMPLE_RATE


def _seconds(path: Path) -> float:
    with safe_open(path, "pt") as file:
        return file.get_slice("samples").get_shape()[0] / SAMPLE_RATE


def collect(out: Path, sentences: Sequence[str], *, shards: int, processes: int | None, seed: int) -> float:
    """Speak `sentences`, spread over the shards; returns the hours there are."""
    out.mkdir(parents=True, exist_ok=True)
    shards = min(shards, len(sentences))
    vocabulary = sorted({word for sentence in sentences for word in words(sentence)})
    work = partial(_numbered, out=out, sentences=sentences, vocabulary=vocabulary, shards=shards, seed=seed)
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    with context.Pool(processes or os.cpu_count()) as pool:
        numbers = pool.imap_unordered(work, range(shards))
        return sum(tqdm(numbers, total=shards, desc="speech data", unit="shard")) / 3600


def _numbered(
    number: int, *, out: Path, sentences: Sequence[str], vocabulary: Sequence[str], shards: int, seed: int
) -> float:
    return make_shard(number, out=out, sentences=sentences[number::shards], vocabulary=vocabulary, seed=seed)


@dataclass(frozen=True, slots=True, eq=False)
class Speech:
    """All shards behind one another, each cut to whole units of `grain` samples.

    Attributes:
        samples: int16 [S].
        tokens: int16 [P].
        ends: int64 [P], in samples of the whole.
        natural: bool [P].
        shards: int64 [N + 1], where each shard begins, and the end.
        voices: int64 [N], index into `names`.
        names: of the voices.
    """

    samples: Tensor
    tokens: Tensor
    ends: Tensor
    natural: Tensor
    shards: Tensor
    voices: Tensor
    names: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, grain: int) -> Speech:
        """Read what `collect` wrote. Raises FileNotFoundError with the command that makes it."""
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(
                f"{folder} holds no speech; make it with: millstream train speech-data --out {folder}"
            )
        samples, tokens, ends, natural, voices, starts = [], [], [], [], [], [0]
        for path in paths:
            with safe_open(path, "pt") as file:
                length = file.get_slice("samples").get_shape()[0] // grain * grain
                samples.append(file.get_tensor("samples")[:length])
                tokens.append(file.get_tensor("tokens"))
                natural.append(file.get_tensor("natural"))
                ends.append(file.get_tensor("ends").long().clamp_max(length) + starts[-1])
                voices.append(list(VOICES).index(file.metadata()["voice"]))
            ends[-1][-1] = starts[-1] + length
            starts.append(starts[-1] + length)
        return cls(
            torch.cat(samples),
            torch.cat(tokens),
            torch.cat(ends),
            torch.cat(natural),
            torch.tensor(starts),
            torch.tensor(voices),
            tuple(VOICES),
        )

    def to(self, device: torch.device) -> Speech:
        names = ("samples", "tokens", "ends", "natural", "shards", "voices")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="millstream train speech-data", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards (115 MB an hour)")
    parser.add_argument("--text", type=Path, default=WORDNET, help="WordNet's folder, or a file of sentences")
    parser.add_argument("--sentences", type=int, help="use only so many")
    parser.add_argument("--shards", type=int, default=96)
    parser.add_argument("--processes", type=int, help="one per core by default")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    train, _ = split(read_sentences(arguments.text))
    hours = collect(
        arguments.out,
        train[: arguments.sentences],
        shards=arguments.shards,
        processes=arguments.processes,
        seed=arguments.seed,
    )
    print(f"{hours:.1f} hours of speech in {arguments.out}")


if __name__ == "__main__":
    main()
