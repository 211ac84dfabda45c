"""How English words sound: a byte model that learnt a lexicon by heart, and the few rules between words.

Letters go through convolutions, each becomes three places, and what stands there is read as CTC does (Graves et al.
2006): blanks out, repeats once. Frequent words that the model gets wrong are listed in its config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from .packed import PackedModelMixin
from .phonemes import PAUSE, PHONEMES, token
from .reading import PAUSE as REST
from .reading import read_words

LETTERS = "abcdefghijklmnopqrstuvwxyz'"
EDGE = len(LETTERS) + 1
PLACES = 3  # per letter: "w" has the most sounds for its length, but the edges lend it theirs
MAX_LETTERS = 30
CLASSES = 2 * len(PHONEMES)  # phoneme and stress; the silent class of "pau" is the blank
VOWELS = frozenset(["aa", "ae", "ah", "ao", "aw", "ax", "ay", "eh", "er", "ey", "ih", "iy", "ow", "oy", "uh", "uw"])
HISSES, VOICELESS = (
    frozenset(["s", "z", "sh", "zh", "ch", "jh"]),
    frozenset(["p", "t", "k", "f", "th", "hh", "s", "sh", "ch"]),
)
CLITICS = {"'s": "z", "'d": "d", "'ll": "l", "'ve": "v"}


class Pronouncer(PackedModelMixin, ModelMixin, ConfigMixin):
    """Text to the tokens of `phonemes`.

    Args:
        dim, layers: of the convolutions over letters.
        exceptions: words the model gets wrong, and their tokens as numbers in a string.
    """

    @register_to_config
    def __init__(self, dim: int = 96, layers: int = 4, exceptions: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(EDGE + 1, dim, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(dim, 2 * dim, 5, padding=2) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, PLACES * CLASSES)
        self.listed = {word: [int(part) for part in said.split()] for word, said in (exceptions or {}).items()}
        self.known: dict[str, list[int]] = {}

    def forward(self, letters: Tensor) -> Tensor:
        """`spelled` words int64 [B, L] to logits [B, L * PLACES, CLASSES]."""
        outside = (letters == 0)[..., None]
        x = self.embedding(letters)
        for norm, convolution in zip(self.norms, self.convolutions):
            normal = norm(x).masked_fill(outside, 0.0)
            x = x + F.glu(convolution(normal.transpose(1, 2)), dim=1).transpose(1, 2)
        return self.head(self.norm(x)).unflatten(2, (PLACES, CLASSES)).flatten(1, 2)

    @torch.no_grad()
    def pronounce(self, words: Sequence[str]) -> list[list[int]]:
        """Tokens of each word, the first of which begins it. Words of letters and apostrophes, lower case."""
        missing = sorted({word for word in words if word not in self.listed and word not in self.known})
        for first in range(0, len(missing), 512):
            part = missing[first : first + 512]
            best = self(spelled(part).to(self.embedding.weight.device)).argmax(dim=-1)
            self.known.update(zip(part, collapsed(best)))
        if len(self.known) > 50_000:  # an endless stream of new words must not fill the memory
            self.known = {word: self.known[word] for word in words if word in self.known}
        return [self.listed.get(word) or self.known[word] for word in words]

    def phonemes(self, text: str) -> Tensor:
        """What to say for a text, int64 [P]: it begins and ends with a pause, unless there is nothing to say ([0])."""
        said = read_words(text)
        spoken = [split_clitic(word) for word in said if word != REST]
        sounds = dict(zip((stem for stem, _ in spoken), self.pronounce([stem for stem, _ in spoken])))
        tokens: list[int] = [PAUSE]
        for number, word in enumerate(said):
            if word == REST:
                tokens.append(PAUSE)
                continue
            stem, clitic = split_clitic(word)
            sound = sounds[stem]
            if stem == "the" and number + 1 < len(said) and said[number + 1] != REST:
                follows = sounds[split_clitic(said[number + 1])[0]]
                vowel = bool(follows) and PHONEMES[follows[0] // 4] in VOWELS
                sound = [token("dh", begins=True), token("iy" if vowel else "ax")]
            tokens += [*sound, *_clitic(clitic, sound)]
        if tokens[-1] != PAUSE:
            tokens.append(PAUSE)
        return torch.tensor(tokens)


def spelled(words: Sequence[str]) -> Tensor:
    """int64 [B, L]: letters between two edges, 0 after the end. Anything else is left out."""
    rows = [[LETTERS.index(c) + 1 for c in word if c in LETTERS][:MAX_LETTERS] for word in words]
    length = max(map(len, rows), default=0) + 2
    return torch.tensor([[EDGE, *row, EDGE] + [0] * (length - 2 - len(row)) for row in rows])


def classes_of(tokens: Sequence[int]) -> list[int]:
    """The class of each sound of a word: 2 * phoneme + stressed."""
    return [value // 2 for value in tokens]


def collapsed(best: Tensor) -> list[list[int]]:
    """CTC's reading of the best classes [B, N], as tokens of words."""
    words = []
    for row in best.tolist():
        kept = [now for before, now in zip([0, *row], row) if now != before and now > 1]
        words.append([2 * value + (index == 0) for index, value in enumerate(kept)])
    return words


def split_clitic(word: str) -> tuple[str, str]:
    """A word and what hangs on it: flite says "dog" and "'s", but "dont" in one."""
    for clitic in CLITICS:
        if word.endswith(clitic) and len(word) > len(clitic):
            return word.removesuffix(clitic).replace("'", ""), clitic
    return word.replace("'", ""), ""


def _clitic(clitic: str, sound: Sequence[int]) -> list[int]:
    if not clitic or not sound:
        return []
    last, name = PHONEMES[sound[-1] // 4], CLITICS[clitic]
    if clitic == "'s":
        names = ["ax", "z"] if last in HISSES else ["s" if last in VOICELESS else "z"]
    else:
        names = [name] if last in VOWELS else ["ax", name]
    return [token(part, begins=index == 0) for index, part in enumerate(names)]
