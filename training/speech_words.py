"""Recipe of the pronouncer: flite's lexicon and letter-to-sound rules, in 0.4 MB that need no flite.

    millstream train speech-words --out runs/speech-words --minutes 2

Words that occur in the sentences are seen more often, and those of them that the packed model still gets wrong are
listed in its config. One word in fifty is never seen and tells how well it guesses.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.pronouncer import MAX_LETTERS, Pronouncer, classes_of, spelled, split_clitic
from .flite import pronounce
from .speech_text import WORDNET, read_sentences, read_words, words
from .trainer import Batch, Budget, Trainer, add_budget, budget_from

HELD_OUT = 50  # one word in so many
EXCEPTIONS = 800  # at most so many are listed


class PronouncerObjective(nn.Module):
    """CTC. Batch: `letters` int64 [B, L], `sounds` int64 [B, P] filled up with 0, `counts` int64 [B] of the sounds."""

    def __init__(self, model: Pronouncer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.model(batch["letters"]).float().log_softmax(-1).transpose(0, 1)
        places = logits.new_full((logits.shape[1],), logits.shape[0], dtype=torch.int64)
        with torch.autocast(logits.device.type, enabled=False):
            loss = F.ctc_loss(logits, batch["sounds"], places, batch["counts"], zero_infinity=True)
        return loss, {"ctc": loss.detach()}


def lexicon(everything: Sequence[str], processes: int | None = None) -> dict[str, list[int]]:
    """How flite says each word; those it has no sound for are left out."""
    with multiprocessing.get_context("fork").Pool(processes or os.cpu_count()) as pool:
        said = pool.map(pronounce, everything, chunksize=1000)
    return {word: tokens for word, tokens in zip(everything, said) if tokens and len(word) <= MAX_LETTERS}


def exceptions(model: Pronouncer, entries: dict[str, list[int]], counts: Counter[str]) -> dict[str, str]:
    """Words of the sentences that `model` says otherwise than `entries`, the commonest first."""
    common = [word for word, _ in counts.most_common() if word in entries]
    wrong = [word for word, said in zip(common, model.pronounce(common)) if said != entries[word]]
    return {word: " ".join(map(str, entries[word])) for word in wrong[:EXCEPTIONS]}


def train(
    model: Pronouncer, entries: dict[str, list[int]], counts: Counter[str], budget: Budget, batch_size: int, out: Path
) -> dict[str, float]:
    """Train, list the exceptions and save to `out`; returns the shares of words that are right."""
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    device = accelerator.device
    known = sorted(entries)
    random.Random(0).shuffle(known)
    held, seen = known[: len(known) // HELD_OUT], known[len(known) // HELD_OUT :]
    held = [word for word in held if counts[word] < 3]
    letters = spelled(seen).to(device)
    sounds = nn.utils.rnn.pad_sequence([torch.tensor(classes_of(entries[word])) for word in seen], batch_first=True)
    sounds, sizes = sounds.to(device), torch.tensor([len(entries[word]) for word in seen], device=device)
    weights = torch.tensor([1.0 + min(counts[word], 50) ** 0.5 for word in seen], device=device)

    def batch() -> Batch:
        some = torch.multinomial(weights, batch_size, replacement=True)
        return {"letters": letters[some], "sounds": sounds[some], "counts": sizes[some]}

    Trainer(PronouncerObjective(model), budget, out, accelerator).fit(batch, title="speech words")
    model = model.cpu().eval()
    with tempfile.TemporaryDirectory() as folder:  # what ships is packed: list what that gets wrong
        model.save_packed(folder)
        packed = Pronouncer.from_pretrained(folder)
    listed = exceptions(packed, entries, counts)
    right = {"held out": share(packed, held, entries), "seen": share(packed, seen[:5000], entries)}
    finished = Pronouncer(model.config["dim"], model.config["layers"], listed)
    finished.load_state_dict(model.state_dict())
    finished.save_pretrained(out)
    return right | {"exceptions": float(len(listed))}


def share(model: Pronouncer, some: Sequence[str], entries: dict[str, list[int]]) -> float:
    """Of words that come out right to the last sound and stress."""
    said = model.pronounce(some)
    return round(sum(tokens == entries[word] for word, tokens in zip(some, said)) / max(1, len(some)), 4)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="millstream train speech-words", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its checkpoint")
    parser.add_argument("--text", type=Path, default=WORDNET, help="WordNet's folder, or a file of sentences")
    parser.add_argument("--words", type=Path, default=WORDNET, help="WordNet's folder, or a file of words")
    parser.add_argument("--processes", type=int, help="one per core by default")
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    add_budget(parser, minutes=2.0, batch_size=2048, unit="words", rate=2e-3)
    arguments = parser.parse_args(argv)
    set_seed(arguments.seed)
    sentences = read_sentences(arguments.text)
    counts = Counter(split_clitic(word)[0] for text in sentences for word in words(text) if word.strip("'"))
    entries = lexicon(sorted(set(read_words(arguments.words)) | set(counts)), arguments.processes)
    model = Pronouncer(arguments.dim, arguments.layers)
    budget = budget_from(arguments, weight_decay=0.0)
    print(train(model, entries, counts, budget, arguments.batch_size, arguments.out))


if __name__ == "__main__":
    main()
