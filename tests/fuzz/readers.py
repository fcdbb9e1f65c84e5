"""A reader of untrusted files under damaged input: an error of one line or a right result."""

import gc
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from inrank_megatron.errors import UserError
from tests.fuzz.bounds import outcome
from tests.fuzz.mutate import copied


@dataclass(frozen=True)
class Reader:
    """One kind of input.

    Args:
        name: what is read.
        make: writes a complete one into an empty folder; gives the path that is named to the reader.
        read: reads it, uses what it has read, and asserts what must be true of that.
        damage: the changes to it.
        examples: how many in the suite.
        settle: what is done to it after the changes, such as to sign it anew.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    damage: st.SearchStrategy
    examples: int
    settle: Callable[[Path], None] = lambda path: None

    def __str__(self) -> str:
        return self.name


@dataclass
class Tally:
    """How many inputs were refused, and how many read."""

    refused: int = 0
    read: int = 0


def intact(reader: Reader, root: Path) -> Path:
    """An intact input of the reader's under ``root``, which it reads."""
    folder = root / reader.name.replace(" ", "-")
    folder.mkdir(parents=True)
    path = reader.make(folder)
    result = reader.read(copied(path, root / "intact" / folder.name / path.name))
    assert not isinstance(result, UserError)
    return path


def attack(
    reader: Reader,
    original: Path,
    scratch: Path,
    *,
    examples: int,
    seed: int | None = None,
    tally: Tally | None = None,
) -> Tally:
    """Feed the reader ``examples`` damaged copies of ``original``; the same ones unless a ``seed`` is given.
    What becomes of them is counted in ``tally``.

    Raises:
        AssertionError, Unending, or what the reader raised: hypothesis shows the damage next to it.
    """
    tally, trap = tally or Tally(), scratch / TRAP
    scratch.mkdir(parents=True, exist_ok=True)

    @settings(
        max_examples=examples,
        derandomize=seed is None,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(reader.damage)
    def property_of(changes) -> None:
        shutil.rmtree(scratch / "input", ignore_errors=True)
        path = copied(original, scratch / "input" / original.name)
        before = os.getcwd()
        os.chdir(scratch)  # a pickle's trap is a name in the present folder
        try:
            for change in changes:
                change.to(path)
            reader.settle(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = outcome(lambda: reader.read(path))
        finally:
            os.chdir(before)
        assert not trap.exists(), "code of the input ran"
        tally.refused += isinstance(result, UserError)
        tally.read += not isinstance(result, UserError)

    gc.collect()
    gc.freeze()  # libraries have half a million objects, and collections between the inputs need not see them
    try:
        (property_of if seed is None else hypothesis.seed(seed)(property_of))()
    finally:
        gc.unfreeze()
    return tally


TRAP = "trap"
"""The folder that code in a hostile input makes, if it runs."""
