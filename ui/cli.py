"""The `millstream` command: runs one of `commands/`, and turns a user's mistake into one sentence and exit code 2.

Nothing heavy is imported here, so `millstream --help` answers at once; each command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .commands import bench, demo, image, info, live, play, run, say, serve, train

# What a user can cause and mend: a wrong value, a path, a package that isn't installed. Anything else is a defect of
# millstream and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError)
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Answers a mistake in one line, without the usage text in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> Parser:
    """The whole command line, one subparser per command."""
    root = Parser(prog="millstream", description="Live generative media: made while you watch and steer it.")
    root.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (demo, run, image, say, play, live, serve, info, bench, train):
        command.add(subparsers)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's own by default).

    Returns:
        0; 2 after a mistake in the command, a path or a missing package, told in one sentence on standard error; 130
        after Ctrl-C, with what was being recorded closed and playable.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        # The recipes have their own parsers, which `argparse` can't nest without eating their options.
        if words[:1] in (["train"], ["evaluate"]):
            return train.run_recipe(words)
        arguments = parser().parse_args(words)
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("millstream: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except USER_ERRORS as error:
        if debug:
            raise
        print(f"millstream: {sentence(error)}", file=sys.stderr)
        return EXIT_USAGE


def sentence(error: BaseException) -> str:
    """`error` in one line: what the operating system says in words, not as "[Errno 2]"."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
