"""What is said for written English, and how words sound."""

from __future__ import annotations

import pytest
import torch

from millstream.models.phonemes import PAUSE, PHONEMES, spell, token
from millstream.models.pronouncer import CLASSES, Pronouncer, classes_of, collapsed, spelled
from millstream.models.reading import number_words, ordinal_words, read_words, year_words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Dr. Smith paid $3.50.", "doctor smith paid three dollars and fifty cents ,"),
        ("1,234,567 km", "one million two hundred thirty four thousand five hundred sixty seven kilometers"),
        ("at 5:30, not 5:07 or 10:00", "at five thirty , not five oh seven or ten o'clock"),
        ("the 21st of May 1999", "the twenty first of may nineteen ninety nine"),
        ("the 1990s, 50% of 3.14 kg", "the nineteen nineties , fifty percent of three point one four kilograms"),
        ("NASA & the FBI in the U.S.", "nasa and the eff bee eye in the you ess ,"),
        ("Mr. and Mrs. Jones, 5 Main St.", "mister and missus jones , five main street ,"),
        ("St. Mary vs. J. Smith etc.", "saint mary versus jay smith et cetera ,"),
        ("$2.5 million, £1.01", "two point five million dollars , one pound and one pence"),
        ("agent 007 -- “hello”… world?!", "agent zero zero seven , hello , world ,"),
        ("well-known don’t café", "well known don't cafe"),
        ("1 km, 2 lbs, 60 mph", "one kilometer , two pounds , sixty miles per hour"),
        ("", ""),
        ("…!? 日本", ","),
    ],
)
def test_text_is_read_as_people_do(text: str, said: str) -> None:
    words = " ".join(read_words(text)).removesuffix(" ,")
    assert words == said.removesuffix(" ,") or (said == "," and words in ("", ","))


def test_numbers_years_and_ordinals() -> None:
    assert number_words(0) == "zero"
    assert number_words(999_999) == "nine hundred ninety nine thousand nine hundred ninety nine"
    assert number_words(-5) == "minus five"
    assert [year_words(year) for year in (1905, 2000, 2005, 1900, 2026)] == [
        "nineteen oh five",
        "two thousand",
        "two thousand five",
        "nineteen hundred",
        "twenty twenty six",
    ]
    assert [ordinal_words(n) for n in (1, 12, 20, 33)] == ["first", "twelfth", "twentieth", "thirty third"]


def word(*sounds: str) -> str:
    """Sounds of a word as its config keeps them; a capital is stressed."""
    tokens = [token(name.lower(), name.isupper(), index == 0) for index, name in enumerate(sounds)]
    return " ".join(map(str, tokens))


@pytest.fixture(scope="module")
def pronouncer() -> Pronouncer:
    listed = {"dog": word("d", "AO", "g"), "boss": word("b", "AA", "s"), "apple": word("AE", "p", "ax", "l")}
    listed |= {"cat": word("k", "AE", "t"), "we": word("w", "IY"), "the": word("dh", "ax")}
    return Pronouncer(16, 1, listed).eval()


@pytest.mark.parametrize(
    ("text", "sounds"),
    [
        ("the dog", "pau | dh ax | d 'ao g pau"),
        ("The apple, the cat.", "pau | dh iy | 'ae p ax l pau | dh ax | k 'ae t pau"),
        ("dog's boss's cat's", "pau | d 'ao g | z | b 'aa s | ax z | k 'ae t | s pau"),
        ("we've cat'll", "pau | w 'iy | v | k 'ae t | ax l pau"),
        ("", "pau"),
    ],
)
def test_words_meet_as_they_do_in_speech(pronouncer: Pronouncer, text: str, sounds: str) -> None:
    assert spell(pronouncer.phonemes(text)) == sounds


def test_unlisted_words_are_guessed_letter_by_letter(pronouncer: Pronouncer) -> None:
    first = pronouncer.pronounce(["zyx", "dog", "zyx"])
    assert first[0] == first[2]
    assert all(0 < value < 4 * len(PHONEMES) for value in first[0])
    letters = spelled(["ab'c", "d"])
    assert letters.tolist()[1] == [28, 4, 28, 0, 0, 0]
    assert pronouncer(letters).shape == (2, 18, CLASSES)
    alone = pronouncer(spelled(["d"]))[0]
    assert torch.allclose(pronouncer(letters)[1, :9], alone, atol=1e-6)  # what is beside a word does not change it


def test_ctc_is_read_back() -> None:
    tokens = [token("k", begins=True), token("ae", True), token("t")]
    low, mid, high = classes_of(tokens)
    assert collapsed(torch.tensor([[0, low, low, 0, mid, high, high, 0]])) == [tokens]
    assert collapsed(torch.tensor([[low, 0, low]])) == [[token("k", begins=True), token("k")]]
    assert PAUSE == 0
