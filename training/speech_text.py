"""Sentences to speak: the examples in WordNet 3.0 (Princeton, a permissive licence), and numbers, questions and rare
words made up around them. Debian: `apt-get install wordnet-base`.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..models.reading import number_words

WORDNET = Path("/usr/share/wordnet")
HELD_OUT = 0.02  # share of the sentences that training never hears
_ASKS = frozenset(
    [
        "who",
        "what",
        "when",
        "where",
        "why",
        "how",
        "which",
        "is",
        "are",
        "was",
        "were",
        "do",
        "does",
        "did",
        "can",
        "could",
        "will",
        "would",
        "shall",
    ]
)
_PLAIN = re.compile(r"[A-Za-z',;\-.!? ]+")


def read_sentences(source: Path = WORDNET) -> list[str]:
    """Every example of two words or more, in one order for ever; or the lines of a text file.

    Raises:
        FileNotFoundError: neither WordNet's `data.noun` and its like are there nor is it a file.
    """
    if source.is_file():
        return source.read_text(encoding="utf-8").splitlines()
    found: set[str] = set()
    for part in ("noun", "verb", "adj", "adv"):
        path = source / f"data.{part}"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; install Debian's wordnet-base, or give a file of sentences"
            )
        for line in path.read_text(encoding="latin-1").splitlines():
            if not line.startswith("  "):
                found.update(re.findall(r'"([^"]+)"', line.split("|", 1)[1]))
    tidy = (" ".join(text.replace("...", ",").split()).strip(" ,;-.") for text in found)
    kept = {text for text in tidy if _PLAIN.fullmatch(text) and 2 <= len(text.split()) <= 24}
    ordered = sorted(kept)
    random.Random(0).shuffle(ordered)
    return ordered


def split(sentences: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those to train on and those held out."""
    count = round(HELD_OUT * len(sentences))
    return list(sentences[count:]), list(sentences[:count])


def easy(sentences: Sequence[str], everything: Sequence[str], known: frozenset[str], count: int) -> list[str]:
    """The first `count` of 5 to 12 words, all of them in `known` and used in three sentences or more.

    A recogniser that was made for news does not know names and rare words; what it cannot hear measures nothing.
    """
    used = Counter(word for text in everything for word in set(words(text)))
    fits = (text for text in sentences if 5 <= len(words(text)) <= 12)
    kept = [text for text in fits if all(word in known and used[word] >= 3 for word in words(text))]
    return kept[:count]


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.sub(r"[^a-z' ]+", " ", text.lower().replace("-", " ")).split()


def spoken(sentence: str, vocabulary: Sequence[str], chance: random.Random) -> str:
    """What to say for a sentence: itself with an end, or at times a list of rare words or of numbers."""
    kind = chance.random()
    if kind < 0.06:
        return " ".join(chance.choices(vocabulary, k=chance.randint(3, 7))) + "."
    if kind < 0.11:
        values = [number_words(int(10 ** chance.uniform(0, 6)) - 1) for _ in range(chance.randint(1, 4))]
        return ", ".join(values) + "."
    asks = sentence.split()[0].lower() in _ASKS
    end = "" if sentence[-1] in ".!?" else "?" if asks else chance.choice("....!")
    text = sentence[0].upper() + sentence[1:] if chance.random() < 0.9 else sentence
    return text + end


def read_words(source: Path = WORDNET) -> list[str]:
    """Every single word that WordNet lists, lower case; or those in the lines of a text file."""
    if source.is_file():
        return sorted(set(words(source.read_text(encoding="utf-8"))))
    found: set[str] = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (source / f"index.{part}").read_text(encoding="latin-1").splitlines():
            lemma = line.split(" ", 1)[0]
            if re.fullmatch(r"[a-z]{2,24}", lemma):
                found.add(lemma)
    return sorted(found)
