"""Flite (CMU, BSD-like licence) through ctypes: waveforms with the exact time of every sound, and its lexicon.

Debian: `apt-get install libflite1`. Where that cannot be done, unpack the package's `libflite*.so.1` (and
`libasound.so.2`) into a folder on LD_LIBRARY_PATH. Flite makes the data and is measured against; the trained model
speaks without it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..models.phonemes import token

VOICES = {"slt": "cmu_us_slt", "rms": "cmu_us_rms", "awb": "cmu_us_awb", "kal": "cmu_us_kal16"}
SAMPLE_RATE = 16000
VOWELS = frozenset(["aa", "ae", "ah", "ao", "aw", "ax", "ay", "eh", "er", "ey", "ih", "iy", "ow", "oy", "uh", "uw"])
_WORD = b"R:SylStructure.parent.parent"
_STRESS = b"R:SylStructure.parent.stress"


class _Wave(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_char_p),
        ("rate", ctypes.c_int),
        ("count", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


class _Voice(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("features", ctypes.c_void_p))


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "flite_synth_text": (ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_void_p]),
    "utt_wave": (ctypes.POINTER(_Wave), [ctypes.c_void_p]),
    "utt_relation": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "relation_head": (ctypes.c_void_p, [ctypes.c_void_p]),
    "item_next": (ctypes.c_void_p, [ctypes.c_void_p]),
    "item_feat_string": (ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "item_feat_float": (ctypes.c_float, [ctypes.c_void_p, ctypes.c_char_p]),
    "ffeature_string": (ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "path_to_item": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "delete_utterance": (None, [ctypes.c_void_p]),
    "feat_set_float": (None, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float]),
    "lex_lookup": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]),
    "val_car": (ctypes.c_void_p, [ctypes.c_void_p]),
    "val_cdr": (ctypes.c_void_p, [ctypes.c_void_p]),
    "val_string": (ctypes.c_char_p, [ctypes.c_void_p]),
    "delete_val_list": (None, [ctypes.c_void_p]),
}


@dataclass(frozen=True, slots=True, eq=False)
class Utterance:
    """Attributes:
    samples: int16 [S], 16 kHz.
    tokens: int16 [P], see `models.phonemes`.
    ends: int32 [P], the sample at which each sound is over; the last is S.
    """

    samples: np.ndarray
    tokens: np.ndarray
    ends: np.ndarray


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libflite.so.1", mode=ctypes.RTLD_GLOBAL)
        for part in ("usenglish", "cmulex"):
            ctypes.CDLL(f"libflite_{part}.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ImportError(f"flite is needed for this ({error}); install Debian's libflite1") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.flite_init()
    return library


@cache
def _voice(name: str) -> Any:
    _library()
    register = getattr(ctypes.CDLL(f"libflite_{VOICES[name]}.so.1"), f"register_{VOICES[name]}")
    register.restype, register.argtypes = ctypes.POINTER(_Voice), [ctypes.c_char_p]
    return register(None)


def speak(text: str, voice: str, stretch: float = 1.0) -> Utterance:
    """`text` as flite says it, `stretch` times as long.

    Raises:
        ImportError: flite is not installed.
    """
    library, speaker = _library(), _voice(voice)
    library.feat_set_float(speaker.contents.features, b"duration_stretch", stretch)
    utterance = library.flite_synth_text(text.encode("ascii", "ignore"), speaker)
    try:
        wave = library.utt_wave(utterance).contents
        samples = np.ctypeslib.as_array(wave.samples, (wave.count,)).copy()
        assert wave.rate == SAMPLE_RATE, "all voices above are of 16 kHz"
        tokens, ends = _segments(library, utterance)
    finally:
        library.delete_utterance(utterance)
    # Diphone voices give the times that were asked for; what came out is a few percent shorter.
    scale = len(samples) / ends[-1]
    places = np.round(np.array(ends) * scale).astype(np.int32)
    return Utterance(samples, np.array(tokens, np.int16), np.maximum.accumulate(places))


def _segments(library: ctypes.CDLL, utterance: int) -> tuple[list[int], list[float]]:
    tokens, ends, word = [], [], None
    item = library.relation_head(library.utt_relation(utterance, b"Segment"))
    while item:
        name = library.item_feat_string(item, b"name").decode()
        now = library.path_to_item(item, _WORD)
        stressed = name in VOWELS and library.ffeature_string(item, _STRESS) == b"1"
        tokens.append(token(name, stressed, begins=bool(now) and now != word))
        ends.append(library.item_feat_float(item, b"end"))
        word = now
        item = library.item_next(item)
    return tokens, ends


@cache
def _lexicon() -> int:
    library = ctypes.CDLL("libflite_cmulex.so.1")
    library.cmu_lex_init.restype = ctypes.c_void_p
    return library.cmu_lex_init()


def pronounce(word: str) -> list[int]:
    """Tokens of one word from flite's lexicon, or from its letter-to-sound rules."""
    library = _library()
    found = library.lex_lookup(_lexicon(), word.encode(), None, None)
    tokens, item = [], found
    while item:
        name = library.val_string(library.val_car(item)).decode()
        stressed, name = name.endswith("1"), name.rstrip("012")
        tokens.append(token(name, stressed and name in VOWELS, begins=not tokens))
        item = library.val_cdr(item)
    library.delete_val_list(found)
    return tokens
