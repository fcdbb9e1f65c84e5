"""What the command lines of the tools have in common. Imports nothing heavy: ``--help`` is quick."""

import argparse
import math
from pathlib import Path

from inrank_megatron.config.folders import named_path


def tool_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser that shows the module's description as it is written and takes no abbreviations."""
    return argparse.ArgumentParser(
        prog=name,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_allow_pickle(parser: argparse.ArgumentParser) -> None:
    """``--allow-pickle``, for the tools that read files of other programs."""
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also open files that can run their writer's code; give it only if you trust the writer",
    )


def add_model_description(parser: argparse.ArgumentParser) -> None:
    """``--model-config`` and ``--vocab-size``, for checkpoints of other programs that lack them."""
    parser.add_argument(
        "--model-config",
        type=path,
        metavar="FILE",
        help="configuration file, as for the launcher, for a checkpoint that does not describe its model",
    )
    parser.add_argument(
        "--vocab-size",
        type=count,
        metavar="N",
        help="size of the vocabulary without padding, for a checkpoint that does not say it",
    )


def path(text: str) -> Path:
    """The type of an option that is a file or a folder. An empty one, as of an unset variable of the shell,
    would be the working directory.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    named = named_path(text)
    try:
        named.exists()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:80]}: {error.strerror}") from None
    return named


def word(text: str) -> str:
    """The type of an option that is a name of any kind."""
    if not text:
        raise argparse.ArgumentTypeError("an empty value; give one, or leave the option out")
    return text


def count(text: str, *, most: int | None = None) -> int:
    """The type of an option that is an integer from 1 to ``most``."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    if most is not None and value > most:
        raise argparse.ArgumentTypeError(f"{value} is above {most}")
    return value


def positive(text: str) -> float:
    """The type of an option that is a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value
