"""Words for pictures: the phrasings that training uses, and those that only evaluation uses.

Held out are whole sentences (`UNSEEN`), each of which has words that training never uses around a name, and a fifth of
all pairs of keywords, chosen by a checksum of the pair, so that a score on them tells whether the meaning was learnt or
the string. The words that say which picture is meant, names and keywords, all occur in training.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from itertools import combinations

UNSEEN = (
    "please paint {a_name} for me",
    "a glossy sticker that shows {a_name}",
    "could you make {a_name}?",
    "{name}, rendered as a small image",
    "my favourite thing is {a_name}",
)
SEEN = (
    ("the", "emoji"),
    ("", "emoji"),
    ("a picture of", ""),
    ("an icon of", ""),
    ("draw", ""),
    ("show me", ""),
    ("", "icon, 3d"),
    ("i want", ""),
    ("one", "on white"),
)
HELD_OUT = 5  # one pair of keywords in so many
# None of these is the word that carries one of the held-out sentences.
FILLERS = str.split(
    "nice little cute beautiful simple shiny tiny huge funny cool pretty lovely new best single clean bright detailed "
    "some any this that our your with and of in to from like again now here really very just maybe photo render a the "
    "i we you they it is was be have has need want would should can will let get give bring show see look find send "
    "draw sketch design create picture drawing icon symbol emoji 3d style realistic minimal modern on at by as but or "
    "so if then than about into over under without white background high quality soft round made using toy version "
    "another every each all one two today tomorrow morning friend kind sort piece example something anything"
)
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"


def phrase(name: str, keywords: Sequence[str], chance: random.Random) -> str:
    """A phrasing for training: `core` in a `frame`."""
    before, after = frame(chance)
    return " ".join(f"{before} {core(name, keywords, chance)} {after}".split())


def core(name: str, keywords: Sequence[str], chance: random.Random) -> str:
    """What a phrasing is about: the name, also a word or a letter short or beside a keyword; or keywords alone."""
    kind, pairs = chance.random(), seen_pairs(keywords)
    if kind < 0.25 and pairs:
        words = list(chance.choice(pairs))
        chance.shuffle(words)
        return chance.choice((" ", ", ", " and ")).join(words)
    if kind < 0.32 and len(name.split()) > 2:
        words = name.split()
        words.pop(chance.randrange(len(words)))
        return " ".join(words)
    if kind < 0.38 and len(name) > 5:
        letter = chance.randrange(1, len(name))
        return name[:letter] + name[letter + 1 :]
    if kind < 0.48 and keywords:
        return chance.choice(("{}, {}", "{1}: {0}", "{1} {0}")).format(name, chance.choice(list(keywords)))
    return chance.choice((name, with_article(name))) + chance.choice(("", "", "", ",", "?", ".", "!"))


def frame(chance: random.Random, known: Sequence[str] = ()) -> tuple[str, str]:
    """What stands before and after a core and means nothing for the picture: what to read past.

    Args:
        known: words that do mean something. Some idle words are made of them with letters before or behind, so that
            an "image" is no mage.
    """
    kind = chance.random()
    if kind < 0.15:
        return "", ""
    if kind < 0.35:
        return chance.choice(SEEN)
    return _idle(chance, chance.randint(0, 6), known), _idle(chance, chance.choice((0, 0, 1, 2, 3, 4, 5, 6)), known)


def _idle(chance: random.Random, count: int, known: Sequence[str]) -> str:
    def word() -> str:
        kind = chance.random()
        if kind < 0.5:
            return chance.choice(FILLERS)
        if kind < 0.65 and known:
            extra = "".join(chance.choices(CONSONANTS + VOWELS, k=chance.randint(1, 3)))
            return chance.choice(("{1}{0}", "{0}{1}")).format(chance.choice(known), extra)
        syllables = (_syllable(chance) for _ in range(chance.randint(1, 4)))
        return "".join(syllables)

    return " ".join(word() for _ in range(count)) + (chance.choice(("", "", "?", "!", ".")) if count else "")


def _syllable(chance: random.Random) -> str:
    end = chance.choice(CONSONANTS) if chance.random() < 0.4 else ""
    return chance.choice(CONSONANTS) + chance.choice(VOWELS) + end


def unseen_phrase(name: str, chance: random.Random) -> str:
    """The name in a sentence that training never used."""
    return chance.choice(UNSEEN).format(name=name, a_name=with_article(name))


def seen_pairs(keywords: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of keywords that training may use."""
    return [pair for pair in combinations(sorted(set(keywords)), 2) if not _is_held_out(pair)]


def unseen_pairs(keywords: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of keywords that only evaluation uses."""
    return [pair for pair in combinations(sorted(set(keywords)), 2) if _is_held_out(pair)]


def with_article(name: str) -> str:
    """ "apple" to "an apple"; plurals and names with an article of their own are left alone."""
    first, last = name.split()[0].lower(), name.split()[-1].lower()
    if first in ("a", "an", "the") or (last.endswith("s") and not last.endswith("ss")):
        return name
    return f"{'an' if first[0] in 'aeiou' else 'a'} {name}"


def _is_held_out(pair: tuple[str, str]) -> bool:
    return zlib.crc32("|".join(pair).encode()) % HELD_OUT == 0
