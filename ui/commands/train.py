"""`millstream train ...` and `millstream evaluate`: the recipes, which read the rest of the command line themselves."""

from __future__ import annotations

import argparse
from importlib import import_module

RECIPES = {
    "data": "make episodes to learn from",
    "codec": "train the autoencoder",
    "world": "train the world model",
    "distill": "make it draw in two steps",
    "pack": "put codec and world into one small folder",
    "emoji-data": "collect named pictures",
    "emoji-codec": "train the autoencoder of picture tokens",
    "emoji": "train the model that draws pictures from words",
    "emoji-pack": "put both into one small folder",
    "emoji-evaluate": "measure whether the drawn pictures are recognised",
    "speech-data": "let flite's voices speak, with the time of every sound",
    "speech-codec": "train the audio codec",
    "speech-words": "train the model that tells how words are pronounced",
    "speech": "train the model that speaks",
    "speech-pack": "put all three into one small folder",
    "sound-tokens": "train a generator over the codes of the audio codec",
    "sound-infill": "train the model that fills speech in",
    "speech-evaluate": "measure whether a recogniser understands what is spoken",
}
USAGE = f"""usage: millstream train RECIPE ...

{chr(10).join(f"  {name:16}{what}" for name, what in RECIPES.items())}

millstream train RECIPE --help lists a recipe's options."""


def add(subparsers: argparse._SubParsersAction) -> None:
    """Name the commands in the help; `run_recipe` takes them before the parser sees them."""
    subparsers.add_parser("train", help=f"make weights: {', '.join(RECIPES)}", add_help=False)
    subparsers.add_parser("evaluate", help="measure a world model against the true game", add_help=False)


def run_recipe(words: list[str]) -> int:
    """Run `train RECIPE ...` or `evaluate ...`.

    Raises:
        ValueError: the recipe is unknown.
        ImportError: the recipe needs a package of the extra `train`.
    """
    if words[0] == "evaluate":
        return _main_of("evaluate", words[1:])
    if len(words) == 1 or words[1] in ("-h", "--help"):
        print(USAGE)
        return 0
    if words[1] not in RECIPES:
        raise ValueError(f"unknown recipe {words[1]!r}; millstream train knows {', '.join(RECIPES)}")
    return _main_of(words[1], words[2:])


def _main_of(module: str, words: list[str]) -> int:
    return import_module(f"...training.{module.replace('-', '_')}", __package__).main(words) or 0
