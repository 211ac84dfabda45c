"""The worlds that are learnt, and the many ways people ask for them in words.

A world is a ViZDoom scenario with one canonical caption that says what is really seen in its frames. A text encoder
that only ever read eight captions would learn eight labels, so training draws a fresh phrasing at every step from a
small grammar: synonyms, word orders, articles, capitals, short forms and a few typing mistakes.

Some synonyms and some sentence frames are HELD OUT: no training phrase ever contains them, and every held-out phrase
has exactly one such part while the rest is known. So held-out phrases test whether the meaning is found although a
part of the sentence is new, which is what a prompt typed by a stranger looks like.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Uniform(Protocol):
    """A source of uniform numbers in [0, 1): `random.Random` and `numpy.random.Generator` both are."""

    def random(self) -> float: ...


@dataclass(frozen=True, slots=True)
class World:
    """`name`: the ViZDoom scenario; `caption`: its canonical prompt, at most 60 characters."""

    name: str
    caption: str


WORLDS: tuple[World, ...] = (
    World("basic", "a brown stone room under a grid ceiling"),
    World("defend_the_center", "a round tan arena at night with pink worms"),
    World("defend_the_line", "a tan brick hall with pink worms and demons"),
    World("health_gathering", "a green slime arena with medkits"),
    World("health_gathering_supreme", "a grey stone maze on green slime with medkits"),
    World("my_way_home", "a dark maze with red, blue and green walls"),
    World("deadly_corridor", "a brick corridor with soldiers"),
    World("take_cover", "a wide brick hall, no gun, demons and fireballs"),
)


def world_named(name: str) -> World:
    """One of `WORLDS`, or the world of a Gymnasium environment, which is asked for by the words of its id."""
    known = {world.name: world for world in WORLDS}
    if name in known:
        return known[name]
    words = re.sub(r"-v\d+$", "", re.split(r"[:/]", name)[-1])
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|[-_]+", " ", words).lower()
    return World(name, f"the world of {words}")


@dataclass(frozen=True, slots=True)
class _Words:
    """Synonyms of one world. The `new_` ones are held out. Looks + place + sights together name the world uniquely."""

    looks: tuple[str, ...]
    places: tuple[str, ...]
    new_places: tuple[str, ...]
    sights: tuple[str, ...]
    new_sights: tuple[str, ...]
    moods: tuple[str, ...]
    short: tuple[str, ...]


_WORDS: dict[str, _Words] = {
    "basic": _Words(
        looks=("brown", "brown stone", "plain brown", "bare", "square", "dusty brown", "small brown", "simple stone"),
        places=("room", "chamber", "cell", "box room", "indoor room"),
        new_places=("vault", "cubicle"),
        sights=(
            "a grid ceiling",
            "a metal grid ceiling",
            "a wire mesh ceiling",
            "a black lattice overhead",
            "one blue spider demon",
            "a single demon by the wall",
            "one lone monster",
        ),
        new_sights=("a ceiling of iron bars", "a solitary beast"),
        moods=("under a grid", "lit evenly", "with a pistol in hand", "with brown walls and floor"),
        short=("grid ceiling room", "brown room", "brown stone room", "room with one demon", "pistol practice room"),
    ),
    "defend_the_center": _Words(
        looks=("round", "round tan", "circular", "circular tan", "ring shaped", "round sandstone", "round beige"),
        places=("arena", "pit", "ring", "courtyard", "colosseum"),
        new_places=("stadium", "amphitheatre"),
        sights=(
            "pink worms",
            "pink worms and armoured soldiers",
            "worms closing in",
            "armoured soldiers all around",
            "grey tiles under the night sky",
            "monsters on every side",
        ),
        new_sights=("rosy serpents", "foes from all directions"),
        moods=("at night", "under a dark blue sky", "with a grey tiled floor", "with a pistol in hand"),
        short=("round arena", "circular arena at night", "round arena worms", "arena with a tiled floor", "tan ring"),
    ),
    "defend_the_line": _Words(
        looks=("tan brick", "tan", "beige brick", "light brick", "long tan brick", "pale brick"),
        places=("hall", "room with a firing line", "shooting gallery", "hall with a grey floor", "gallery"),
        new_places=("ballroom", "warehouse"),
        sights=(
            "pink worms and demons",
            "a row of pink worms and demons",
            "worms and fireball demons",
            "a line of worms and imps",
            "a pistol against worms",
            "pink snakes and brown demons",
        ),
        new_sights=("a queue of coral vipers", "rosy serpents and fiends"),
        moods=("with a grey ceiling", "with a pistol in hand", "facing the far wall", "ready to shoot"),
        short=("worms and demons hall", "tan hall with worms", "brick hall worms", "shooting gallery with worms"),
    ),
    "health_gathering": _Words(
        looks=("green slime", "slimy green", "open slime", "acid green", "wide green slime", "toxic green"),
        places=("arena", "field", "pool", "lake", "yard"),
        new_places=("swamp", "lagoon"),
        sights=(
            "medkits",
            "health packs",
            "white medkits",
            "first aid kits",
            "scattered medkits",
            "medkits and mossy walls",
            "health kits everywhere",
        ),
        new_sights=("medical crates", "healing supplies"),
        moods=("at night", "under a dark blue sky", "between mossy walls", "in the open"),
        short=(
            "slime arena",
            "green slime medkits",
            "slime with medkits",
            "acid pool",
            "green slime",
            "open slime field",
        ),
    ),
    "health_gathering_supreme": _Words(
        looks=("grey stone", "gray stone", "grey walled", "grey", "gray", "grey block"),
        places=("maze on green slime", "slime maze", "labyrinth in slime", "maze over acid", "slime labyrinth"),
        new_places=("warren of slime", "slime catacomb"),
        sights=(
            "medkits",
            "medkits and poison vials",
            "health packs",
            "white medkits",
            "first aid kits",
            "medkits around the corners",
        ),
        new_sights=("medical crates", "healing supplies"),
        moods=("at night", "under a dark blue sky", "between grey walls", "with many corners"),
        short=("slime maze", "grey maze with slime", "grey stone maze", "stone maze medkits", "gray slime labyrinth"),
    ),
    "my_way_home": _Words(
        looks=("dark", "dim brown", "winding", "colourful", "colorful", "gloomy", "twisting"),
        places=("maze", "maze of rooms", "labyrinth of rooms", "set of connected rooms", "indoor labyrinth"),
        new_places=("tangle of chambers", "rabbit warren"),
        sights=(
            "red, blue and green walls",
            "red walls",
            "bright red walls",
            "red and blue walls",
            "walls of many colours",
            "green vines and red walls",
            "blue curtains and red walls",
        ),
        new_sights=("scarlet panels", "crimson partitions"),
        moods=("indoors", "without a gun", "with stone floors", "with no enemies"),
        short=("red maze", "red walls", "indoor maze", "maze of red rooms", "colourful maze", "rooms with red walls"),
    ),
    "deadly_corridor": _Words(
        looks=("brick", "dark brick", "brown brick", "narrow", "narrow brick", "dark stone", "long dark"),
        places=("corridor", "hallway", "passage", "tunnel", "passageway"),
        new_places=("alley", "catwalk"),
        sights=(
            "soldiers",
            "armed soldiers",
            "soldiers on both sides",
            "gunmen",
            "enemy soldiers",
            "soldiers shooting",
            "guards with guns",
        ),
        new_sights=("riflemen", "hostile troopers"),
        moods=("in the dark", "with a pistol in hand", "with blood on the walls", "with a stone floor"),
        short=("brick corridor", "soldier corridor", "corridor with soldiers", "dark tunnel", "hallway gunmen"),
    ),
    "take_cover": _Words(
        looks=("wide brick", "wide tan", "wide", "broad brick", "huge brick", "broad tan"),
        places=("hall", "dodging hall", "room full of fireballs", "hall without a gun", "empty handed hall"),
        new_places=("hangar", "depot"),
        sights=(
            "demons and fireballs",
            "demons throwing fireballs",
            "flying fireballs",
            "fireballs to dodge",
            "fireballs and no gun",
            "far away demons hurling fire",
        ),
        new_sights=("blazing projectiles", "incoming flames"),
        moods=("without a weapon", "unarmed", "with no gun", "with a grey floor and ceiling"),
        short=("dodge fireballs", "fireball hall", "wide hall fireballs", "unarmed in a wide hall", "take cover"),
    ),
}

_FRAMES = (
    "{place} with {sight}",
    "{place}, {sight}",
    "{place} and {sight}",
    "{place} {mood} with {sight}",
    "{place} with {sight}, {mood}",
    "{place}, {mood}, {sight}",
    "{sight} in {place}",
    "{sight} inside {place} {mood}",
    "{sight}, {place}",
    "{mood}: {place}, {sight}",
    "show me {place} with {sight}",
    "take me to {place} with {sight}",
    "i want {place} and {sight}",
    "walk through {place} with {sight}",
    "a game in {place} with {sight}",
    "doom, {place}, {sight}",
    "you see {place} and {sight} {mood}",
)
_NEW_FRAMES = (
    "imagine {sight} somewhere around {place}",
    "{place} that has {sight} in it",
    "let us wander {place}, past {sight}",
    "what about {place} containing {sight}?",
)


_CALLS = ("{}", "{}, please", "take me to {}", "i want to play in {}", "show me {}")
_NEW_CALLS = ("could we visit {}?", "a walk in {}")


def phrases(world: World, rng: Uniform, *, held_out: bool = False) -> str:
    """One phrasing of `world`, drawn with `rng`: a training phrase, or one of the disjoint held-out set.

    Args:
        world: from `world_named`; one that is not of `WORLDS` is called by its caption, in several ways.
        rng: `random.Random` or `numpy.random.Generator`; the same state gives the same phrase.
        held_out: draw a phrase with one part (place, sight or sentence frame) that no training phrase has.
    """
    if world.name not in _WORDS:
        return _capitals(_pick(_NEW_CALLS if held_out else _CALLS, rng).format(world.caption), rng)
    words = _WORDS[world.name]
    if held_out:
        return _capitals(_new_sentence(words, rng), rng)
    draw = rng.random()
    if draw < 0.1:
        text = world.caption
    elif draw < 0.22:
        text = _pick(words.short, rng)
    else:
        text = _sentence(_pick(_FRAMES, rng), words.places, words.sights, words, rng)
    if rng.random() < 0.08:
        text = _mistype(text, rng)
    return _capitals(text, rng)


def _new_sentence(words: _Words, rng: Uniform) -> str:
    """A sentence with exactly one held-out part; no typing mistakes, so the new part stays what it is."""
    draw = rng.random()
    if draw < 1 / 3:
        return _sentence(_pick(_FRAMES, rng), words.new_places, words.sights, words, rng)
    if draw < 2 / 3:
        return _sentence(_pick(_FRAMES, rng), words.places, words.new_sights, words, rng)
    return _sentence(_pick(_NEW_FRAMES, rng), words.places, words.sights, words, rng)


def _sentence(frame: str, places: Sequence[str], sights: Sequence[str], words: _Words, rng: Uniform) -> str:
    place = f"{_pick(words.looks, rng)} {_pick(places, rng)}"
    indefinite = "an" if place[0] in "aeiou" else "a"
    place = _pick((f"{indefinite} {place}",) * 3 + (f"the {place}", place), rng)
    return frame.format(place=place, sight=_pick(sights, rng), mood=_pick(words.moods, rng))


def _pick(options: Sequence[str], rng: Uniform) -> str:
    return options[int(rng.random() * len(options))]


def _mistype(text: str, rng: Uniform) -> str:
    """One slip of the fingers: a letter is left out, doubled, or swapped with the next one."""
    inside = [index for index in range(len(text) - 1) if text[index : index + 2].isalpha()]
    at = inside[int(rng.random() * len(inside))]
    left_out, doubled = text[:at] + text[at + 1 :], text[: at + 1] + text[at:]
    swapped = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return _pick((left_out, doubled, swapped), rng)


def _capitals(text: str, rng: Uniform) -> str:
    """Mostly lower case, sometimes a sentence, a title or a shout; sometimes a full stop."""
    style = rng.random()
    if style > 0.95:
        text = text.upper()
    elif style > 0.9:
        text = text.title()
    elif style > 0.7:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.1 and text[-1].isalpha() else text
