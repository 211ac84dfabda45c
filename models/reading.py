"""Written English as it is read aloud: words and pauses, with numbers, money, times and abbreviations spelt out."""

from __future__ import annotations

import re
import unicodedata

ONES = (
    *[
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
    ],
    *["sixteen", "seventeen", "eighteen", "nineteen"],
)
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
GROUPS = ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))
ORDINALS = {
    **{"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth"},
    "twelve": "twelfth",
}
LETTERS = dict(
    zip(
        "abcdefghijklmnopqrstuvwxyz",
        [
            "ay",
            "bee",
            "see",
            "dee",
            "ee",
            "eff",
            "gee",
            "aitch",
            "eye",
            "jay",
            "kay",
            "ell",
            "em",
            "en",
            "oh",
            "pee",
            "cue",
            "ar",
            "ess",
            "tee",
            "you",
            "vee",
            "w",
            "ex",
            "why",
            "zee",
        ],
    )
)
ABBREVIATIONS = {
    **{"mr": "mister", "mrs": "missus", "ms": "miss", "dr": "doctor", "prof": "professor", "st": "saint"},
    **{"jr": "junior", "sr": "senior", "vs": "versus", "etc": "et cetera", "approx": "approximately"},
    **{"dept": "department", "govt": "government", "capt": "captain", "gen": "general", "sgt": "sergeant"},
    **{"ave": "avenue", "blvd": "boulevard", "rd": "road", "mt": "mount", "ft": "feet", "inc": "incorporated"},
    **{"ltd": "limited", "corp": "corporation", "jan": "january", "feb": "february", "aug": "august"},
    **{"sept": "september", "oct": "october", "nov": "november", "dec": "december"},
}
UNITS = {
    **{"km": "kilometer", "cm": "centimeter", "mm": "millimeter", "kg": "kilogram", "mg": "milligram"},
    **{"ms": "millisecond", "khz": "kilohertz", "mhz": "megahertz", "ghz": "gigahertz", "hz": "hertz"},
    **{"mph": "mile per hour", "lb": "pound", "lbs": "pound", "oz": "ounce", "mb": "megabyte", "gb": "gigabyte"},
}
SYMBOLS = {"&": "and", "+": "plus", "=": "equals", "@": "at", "%": "percent", "#": "number", "°": "degrees"}
MONEY = {"$": ("dollar", "cent"), "€": ("euro", "cent"), "£": ("pound", "pence")}
PAUSE = ","

_ASCII = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": " - ", "—": " - ", "…": "."})
_TOKEN = re.compile(
    r"(?P<money>[$€£]\d[\d,]*(?:\.\d+)?(?: (?:thousand|million|billion|trillion)\b)?)"
    r"|(?P<time>\b\d{1,2}:\d{2}\b)"
    r"|(?P<ordinal>\b\d[\d,]*(?:st|nd|rd|th)\b)"
    r"|(?P<decade>\b\d{3}0s\b)"
    r"|(?P<number>\d[\d,]*\d|\d)(?P<fraction>\.\d+)?"
    r"|(?P<dotted>\b(?:[A-Za-z]\.){2,})"
    r"|(?P<word>[A-Za-z]+(?:'[A-Za-z]+)*'?)(?P<dot>\.?)"
    r"|(?P<pause>[,.;:?!()\"\[\]]|-(?=\s)|\n)"
    r"|(?P<symbol>[&+=@%#°])"
)


def number_words(value: int) -> str:
    """A whole number in words, American style: "one hundred five"."""
    if value < 0:
        return "minus " + number_words(-value)
    if value < 20:
        return ONES[value]
    if value < 100:
        return TENS[value // 10 - 2] + (" " + ONES[value % 10] if value % 10 else "")
    for unit, name in GROUPS:
        if value >= unit:
            rest = f" {number_words(value % unit)}" if value % unit else ""
            return f"{number_words(value // unit)} {name}{rest}"
    raise AssertionError("100 is the smallest group")


def year_words(value: int) -> str:
    """1999 as "nineteen ninety nine", 1905 as "nineteen oh five", 2005 as "two thousand five"."""
    century, year = divmod(value, 100)
    if value % 1000 < 10 or (year == 0 and century % 10 == 0):
        return number_words(value)
    if year == 0:
        return f"{number_words(century)} hundred"
    return f"{number_words(century)} {'oh ' if year < 10 else ''}{number_words(year)}"


def ordinal_words(value: int) -> str:
    """21 as "twenty first"."""
    *front, last = number_words(value).split()
    if last in ORDINALS:
        last = ORDINALS[last]
    else:
        last = (last[:-1] + "ie" if last.endswith("y") else last) + "th"
    return " ".join([*front, last])


def digits_words(digits: str) -> str:
    return " ".join(ONES[int(digit)] for digit in digits)


def read_words(text: str) -> list[str]:
    """Lower-case words of letters and apostrophes, and `PAUSE` where the voice rests; never two rests in a row.

    "Dr. Smith paid $3.50 at 5:30 in 1999." gives doctor smith paid three dollars and fifty cents at five thirty in
    nineteen ninety nine. Characters that nobody says are left out.
    """
    text = unicodedata.normalize("NFKD", text.translate(_ASCII)).replace("⁄", " over ")
    said: list[str] = []
    matches = list(_TOKEN.finditer(text))
    for index, match in enumerate(matches):
        after = matches[index + 1] if index + 1 < len(matches) else None
        for word in _say(match, after, text).split():
            if word != PAUSE or (said and said[-1] != PAUSE):
                said.append(word)
    return said


def _say(match: re.Match[str], after: re.Match[str] | None, text: str) -> str:
    kind = match.lastgroup if match.lastgroup not in ("dot", "fraction") else None
    if match["word"]:
        return _say_word(match, after, text)
    if match["number"]:
        return _say_number(match["number"], match["fraction"] or "")
    whole = match.group()
    if kind == "money":
        return _say_money(whole)
    if kind == "time":
        hours, minutes = whole.split(":")
        tail = "o'clock" if minutes == "00" else ("oh " if minutes[0] == "0" else "") + number_words(int(minutes))
        return f"{number_words(int(hours))} {tail}"
    if kind == "decade":
        years = year_words(int(whole[:-1]))
        return years[:-1] + "ies" if years.endswith("y") else years + "s"
    if kind == "ordinal":
        return ordinal_words(int(whole[:-2].replace(",", "")))
    if kind == "dotted":
        names = " ".join(LETTERS[letter.lower()] for letter in whole if letter != ".")
        return names if after is not None and text[match.end() :].lstrip()[:1].islower() else f"{names} {PAUSE}"
    return PAUSE if kind == "pause" else SYMBOLS[whole]


def _say_word(match: re.Match[str], after: re.Match[str] | None, text: str) -> str:
    word, dot = match["word"].rstrip("'"), match["dot"]
    lower = word.lower()
    before = text[: match.start()].rstrip()
    if lower in UNITS and before[-1:].isdigit() and match.start() - len(before) <= 1:
        one = re.search(r"(?<![\d.,])1$", before) is not None or lower in ("hz", "khz", "mhz", "ghz")
        return _plural(UNITS[lower], one) + (f" {PAUSE}" if dot and after is None else "")
    if lower in ABBREVIATIONS and (dot or lower in ("mr", "mrs", "dr", "vs", "etc")):
        named = lower != "st" or (after is not None and (after["word"] or "")[:1].isupper())
        return ABBREVIATIONS[lower] if named else "street"
    spelt = word.isupper() and len(word) > 1 and (len(word) < 4 or not set(lower) & set("aeiou"))
    if spelt and not text.isupper():
        lower = " ".join(LETTERS[letter] for letter in lower if letter in LETTERS)
    initial = dot and len(word) == 1 and word.isupper() and word != "I"
    if initial:
        return LETTERS[lower]
    return f"{lower} {PAUSE}" if dot else lower


def _plural(unit: str, one: bool) -> str:
    head, *rest = unit.split(" ", 1)
    return " ".join([head if one else head + "s", *rest])


def _say_number(digits: str, fraction: str) -> str:
    value = int(digits.replace(",", ""))
    tail = f" point {digits_words(fraction[1:])}" if fraction else ""
    if value >= 10**15 or (len(digits) > 1 and digits[0] == "0"):
        return digits_words(digits.replace(",", "")) + tail
    if not fraction and "," not in digits and len(digits) == 4 and 1100 <= value < 2100:
        return year_words(value)
    return number_words(value) + tail


def _say_money(whole: str) -> str:
    amount, _, scale = whole[1:].partition(" ")
    units, _, cents = amount.replace(",", "").partition(".")
    major, minor = MONEY[whole[0]]
    if scale:
        said = number_words(int(units)) + (f" point {digits_words(cents)}" if cents else "")
        return f"{said} {scale} {major}s"
    said = f"{number_words(int(units))} {major}{'' if int(units) == 1 else 's'}"
    count = int(cents.ljust(2, "0")[:2]) if cents else 0
    if count:
        said += f" and {number_words(count)} {minor}{'' if count == 1 or minor == 'pence' else 's'}"
    return said
