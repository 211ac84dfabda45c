"""Words for pictures: the phrasings that training uses, and those that only evaluation uses.

Held out are whole sentences (`UNSEEN`) and a fifth of all pairs of keywords, chosen by a checksum of the pair, so that
a score on them tells whether the meaning was learnt or the string.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from itertools import combinations

SEEN = (
    "{name}",
    "{a_name}",
    "the {name} emoji",
    "{name} emoji",
    "a picture of {a_name}",
    "an icon of {a_name}",
    "draw {a_name}",
    "show me {a_name}",
    "{name} icon, 3d",
    "i want {a_name}",
    "{name}, {keyword}",
    "{keyword}: {name}",
    "one {name} on white",
)
UNSEEN = (
    "please paint {a_name} for me",
    "a glossy sticker that shows {a_name}",
    "could you make {a_name}?",
    "{name}, rendered as a small image",
    "my favourite thing is {a_name}",
)
HELD_OUT = 5  # one pair of keywords in so many
FILLERS = str.split(
    "nice little cute beautiful simple shiny tiny huge funny cool pretty lovely new best single clean bright detailed "
    "some any this that our your with and of in to from like again now here really very just maybe thing photo render"
)
SYLLABLES = str.split("ba ce di fo gu ha ki lo mu ne pra ri sto ta vel wo xu ya zen tri plo ska")


def phrase(name: str, keywords: Sequence[str], chance: random.Random) -> str:
    """A phrasing for training: the name in a sentence, among idle words or a letter short; or keywords alone."""
    kind = chance.random()
    seen = seen_pairs(keywords)
    if kind < 0.25 and seen:
        words = list(chance.choice(seen))
        chance.shuffle(words)
        return chance.choice((" ", ", ", " and ")).join(words)
    if kind < 0.32 and len(name.split()) > 2:
        words = name.split()
        words.pop(chance.randrange(len(words)))
        return " ".join(words)
    if kind < 0.38 and len(name) > 5:
        letter = chance.randrange(1, len(name))
        return name[:letter] + name[letter + 1 :]
    if kind < 0.65:
        return surrounded(chance.choice((name, with_article(name))), chance)
    return _fill(chance.choice(SEEN), name, keywords, chance)


def surrounded(text: str, chance: random.Random) -> str:
    """`text` among words that mean nothing for the picture, some of them made up: what to read past."""

    def words(most: int) -> list[str]:
        made_up = ("".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(most))
        return [word if chance.random() < 0.5 else chance.choice(FILLERS) for word in made_up]

    return " ".join([*words(chance.randint(0, 5)), text, *words(chance.randint(0, 3))])


def unseen_phrase(name: str, keywords: Sequence[str], chance: random.Random) -> str:
    """The name in a sentence that training never used."""
    return _fill(chance.choice(UNSEEN), name, keywords, chance)


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


def _fill(template: str, name: str, keywords: Sequence[str], chance: random.Random) -> str:
    keyword = chance.choice(list(keywords)) if keywords else "emoji"
    return template.format(name=name, a_name=with_article(name), keyword=keyword)
