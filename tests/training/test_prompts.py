"""Many ways to ask for each world, some never used in training, none that could mean another world."""

from __future__ import annotations

import random
import re
from collections import Counter

import numpy as np
import pytest

from millstream.training.prompts import WORLDS, World, phrases, world_named

DRAWS = 6000
by_name = pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)


def plain(text: str) -> str:
    return re.sub(r"[^a-z]+", " ", text.lower()).strip()


def drawn(world: World, *, held_out: bool = False, count: int = DRAWS) -> list[str]:
    rng = random.Random(0)
    return [phrases(world, rng, held_out=held_out) for _ in range(count)]


def test_captions_are_short_and_differ():
    assert all(len(world.caption) <= 60 and world.caption == world.caption.lower() for world in WORLDS)
    assert len({world.caption for world in WORLDS}) == len({world.name for world in WORLDS}) == len(WORLDS) >= 6


@by_name
def test_there_are_thousands_of_phrasings(world):
    texts = [plain(text) for text in drawn(world)]
    assert len(set(texts)) > 2000
    assert world.caption in [text.lower().rstrip(".") for text in drawn(world)], "the caption itself is never learnt"


@by_name
def test_phrasings_are_clean_one_line_prompts(world):
    for text in drawn(world) + drawn(world, held_out=True):
        assert 3 <= len(text) <= 120, text
        assert text == " ".join(text.split()), f"stray spaces in {text!r}"
        assert "{" not in text
        assert text.isascii()
    for text in drawn(world, held_out=True):  # training phrases also hold slips of the fingers
        assert not re.search(r"\ba [aeio]|\ban [^aeio]", text.lower()), text


@by_name
def test_held_out_phrasings_are_never_trained_on(world):
    trained = {plain(text) for other in WORLDS for text in drawn(other)}
    held_out = {plain(text) for text in drawn(world, held_out=True)}
    assert len(held_out) > 1000
    assert not trained & held_out


def test_a_training_phrase_never_holds_a_held_out_word():
    trained = Counter(word for world in WORLDS for text in drawn(world) for word in plain(text).split())
    held_out = Counter(word for world in WORLDS for text in drawn(world, held_out=True) for word in plain(text).split())
    new = {word for word, count in held_out.items() if count > 50 and word not in trained}
    assert {"imagine", "vault", "stadium", "lagoon", "alley", "riflemen", "scarlet", "hangar"} <= new


def test_no_phrase_means_two_worlds():
    owners: dict[str, set[str]] = {}
    for world in WORLDS:
        for text in drawn(world) + drawn(world, held_out=True):
            owners.setdefault(plain(text), set()).add(world.name)
    assert not {text: names for text, names in owners.items() if len(names) > 1}


def test_worlds_can_be_told_apart_by_their_words():
    """A plain bag-of-words reader, fitted on training phrases, names the world of held-out ones."""
    counts = {world.name: Counter(" ".join(map(plain, drawn(world))).split()) for world in WORLDS}
    totals = {name: sum(words.values()) for name, words in counts.items()}

    def read(text: str) -> str:
        score = {
            name: sum(np.log((words[word] + 0.5) / totals[name]) for word in plain(text).split())
            for name, words in counts.items()
        }
        return max(score, key=score.__getitem__)

    for world in WORLDS:
        texts = drawn(world, held_out=True, count=300)
        assert sum(read(text) == world.name for text in texts) / len(texts) > 0.97, world.name


def test_phrases_follow_the_generator_whichever_kind_it_is():
    world = WORLDS[0]
    for make in (random.Random, np.random.default_rng):
        first, again, other = ([phrases(world, rng) for _ in range(20)] for rng in (make(1), make(1), make(2)))
        assert first == again != other


def test_a_gymnasium_environment_is_called_by_the_words_of_its_id():
    world = world_named("crafter.env:CrafterReward-v1")
    assert world.caption == "the world of crafter reward"
    said = {phrases(world, random.Random(seed)).lower().rstrip(".") for seed in range(40)}
    assert len(said) > 3
    assert all("the world of crafter reward" in phrase for phrase in said)
    assert not said & {phrases(world, random.Random(seed), held_out=True).lower().rstrip(".") for seed in range(40)}
