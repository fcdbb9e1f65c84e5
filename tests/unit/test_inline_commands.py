"""Commands in the sentences and tables of the documents, and the launchers' own flags in all commands.

``test_commands.py`` reads the blocks; here each program's own parser reads what is written in between, and
DeepSpeed's launcher and torchrun read what comes before the program that they start.
"""

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deepspeed.launcher import runner
from torch.distributed.run import get_args_parser

from inrank_megatron.config.cli import parse
from tests.unit.test_commands import COMMANDS, PAGES, PROGRAM, ROOT, TOOLS, name_of

LAUNCHERS: dict[str, Callable[[list[str]], object]] = {
    "deepspeed": runner.parse_args,
    "torchrun": lambda words: get_args_parser().parse_args(words),
}
LAUNCHED = [(page, words) for page, _, words in COMMANDS if words[0] in LAUNCHERS]


def inline_commands(page: Path) -> Iterator[list[str]]:
    """The words of each inline code that calls a program, without variables before it and without ``...``."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", text):
        call = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", code)
        program, _, rest = call.partition(" ")
        if program in READERS and rest and not rest.startswith("title="):  # the mark of a block, quoted
            yield [word for word in shlex.split(call) if word != "..."]


def read_launch(words: list[str]) -> None:
    """A launcher's flags; where the page leaves out what it starts, the launch program stands for it."""
    program = [] if any(word.endswith(".py") or word in PROGRAM for word in words) else [PROGRAM[0]]
    LAUNCHERS[words[0]]([*words[1:], *program])


def read_python(words: list[str]) -> None:
    start, *arguments = words[1:]
    if start == "-m":
        assert importlib.util.find_spec(arguments[0])
    elif start in PROGRAM:
        parse(arguments, world_size=1)
    elif start.startswith("tools/"):
        TOOLS[Path(start).stem](arguments)
    else:
        read_file(words)


def read_file(words: list[str]) -> None:
    assert (ROOT / words[1]).is_file()


def read_pip(words: list[str]) -> None:
    """The project's extras exist; other packages need a network."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(rf"{project['name']}\[(\w+)\]", " ".join(words)):
        assert extra in project["optional-dependencies"]


def read_cluster_launch(words: list[str]) -> None:
    """``srun`` and ``mpirun`` need a cluster; what they start does not."""
    read_python(words[words.index("python") :])


READERS: dict[str, Callable[[list[str]], None]] = {
    "python": read_python,
    "pip": read_pip,
    **dict.fromkeys(LAUNCHERS, read_launch),
    **dict.fromkeys(("bash", "pytest"), read_file),
    **dict.fromkeys(("srun", "mpirun", "mpiexec"), read_cluster_launch),
}
INLINE = [(name_of(page), words) for page in PAGES for words in inline_commands(page)]


def test_the_sentences_have_commands():
    assert len(INLINE) > 40 and len(LAUNCHED) > 15


@pytest.mark.parametrize(
    ("page", "words"), INLINE, ids=lambda value: value if isinstance(value, str) else None
)
def test_a_command_in_a_sentence_is_one_that_its_program_reads(page, words):
    READERS[words[0]](words)


@pytest.mark.parametrize(
    ("page", "words"), LAUNCHED, ids=lambda value: value if isinstance(value, str) else None
)
def test_a_launcher_reads_its_own_flags(page, words):
    read_launch(words)
