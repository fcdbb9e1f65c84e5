"""Damage to a file or folder that was whole: bytes, trees of values, and what lies where a file should."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from tests.fuzz.values import dump, edit, edits

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
CONTENTS = (
    b"", b"\0", b"null", b"[]", b"{}", b"0", b'""', b"[" * 10**5, b'{"a":' * 10**5, b"\xff\xfe\0x", POINTER,
    b"\0" * 5000, b"PK\x03\x04", b"PK\x05\x06" + b"\0" * 18, b"\x80\x02.", b"\x1f\x8b\x08\0", b"PAR1PAR1",
    b"\x93NUMPY\x01\0\xff\xff{", b"MMIDIDX\0\0" + b"\xff" * 25, b"\xff" * 8 + b"{}", b"- *x", b"&a [*a, *a]",
    b"!!python/object/apply:os.system ['true']", b"%TAG ! !\n---\n", b"a: b: c", b"\t", b"? {a: 1}\n: 2",
)  # fmt: skip
NUMBERS = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**18)
PLACES = 10**4
KINDS_OF_BYTES = ("truncate", "flip", "number", "insert", "repeat", "cut", "content")
KINDS_OF_FILES = ("remove", "swap", "folder", "zero", "pipe", "loop", "dangling", "away", "stray")
NAMES = ("\udcff", "x" * 255, "step_00000009", "tensors_00009.safetensors", "..x", "a\nb", " ", "٣", "None")


@dataclass(frozen=True)
class Damage:
    """What to do (``kind``), ``where``, as a number below ``PLACES`` squared, and with what."""

    kind: str
    where: int
    value: Any

    def to(self, root: Path) -> None:
        """Do it to the file or folder ``root``."""
        # Never through a link: what it leads to is none of the input's.
        files = sorted(p for p in [root, *root.rglob("*")] if p.is_file() and not p.is_symlink())
        if not files:
            return
        file, place = (number / PLACES for number in divmod(self.where, PLACES))
        path = files[int(file * len(files))]
        if self.kind in KINDS_OF_BYTES:
            path.write_bytes(_altered(path.read_bytes(), self.kind, place, self.value))
        elif self.kind in KINDS_OF_FILES:
            _replace(path, self.kind, files[int(place * len(files))], self.value)
        else:
            DEEPER[self.kind](path, self.value)


def damages(*deeper: tuple[str, st.SearchStrategy]) -> st.SearchStrategy[list[Damage]]:
    """One to three changes. ``deeper``: kinds of :data:`DEEPER`, each with what it takes."""
    where, number = st.integers(0, PLACES**2 - 1), st.one_of(st.sampled_from(NUMBERS), st.integers(0, 10**6))
    plain = st.builds(Damage, st.sampled_from([*KINDS_OF_BYTES, *KINDS_OF_FILES]), where, number)
    inside = [st.builds(Damage, st.just(kind), where, values) for kind, values in deeper]
    # What is well formed gets further into a reader than what is not.
    return st.lists(st.one_of(plain, *inside, *inside), min_size=1, max_size=3)


def copied(original: Path, to: Path) -> Path:
    """A copy of the file or folder at ``to``."""
    if original.is_dir():
        return Path(shutil.copytree(original, to, copy_function=shutil.copyfile))
    to.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(original, to))


def _altered(data: bytes, kind: str, place: float, value: int) -> bytes:
    at = int(place * len(data))
    length = value % 64 + 1
    if kind == "truncate":
        return data[:at]
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (value % 255 + 1)]) + data[at + 1 :] if data else b"\0"
    if kind == "number":
        width = (1, 4, 8)[value % 3]
        at -= at % width
        return data[:at] + (value % 2 ** (8 * width)).to_bytes(width, "little") + data[at + width :]
    if kind == "insert":
        return data[:at] + value.to_bytes(8, "little")[:length] + data[at:]
    if kind == "repeat":
        return data[:at] + data[at : at + length] * (1 + value % 1000) + data[at:]
    if kind == "cut":
        return data[:at] + data[at + length :]
    return CONTENTS[value % len(CONTENTS)]


def _replace(path: Path, kind: str, other: Path, value: int) -> None:
    if kind == "stray":
        with suppress(OSError, UnicodeError):
            (path.parent / NAMES[value % len(NAMES)]).write_bytes(CONTENTS[value % len(CONTENTS)])
        return
    if kind == "swap":
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)
        return
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(path.parent / "nothing")
    elif kind == "away":
        path.symlink_to(os.devnull if value % 2 else __file__)


def edited_json(path: Path, changes: Iterable[tuple]) -> None:
    """Change values in a file of JSON, or in each line of one; other files stay."""
    try:
        text = path.read_text(encoding="utf-8")
        trees = [json.loads(text)]
    except (ValueError, RecursionError):
        try:
            trees = [json.loads(line) for line in text.splitlines()]
        except (ValueError, RecursionError, NameError):
            return
    path.write_bytes(b"\n".join(dump(tree) for tree in _edited(trees, changes)) + b"\n")


def edited_yaml(path: Path, changes: Iterable[tuple]) -> None:
    """Change values in a file of YAML; other files stay."""
    if path.suffix != ".yaml":
        return
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        return
    if isinstance(tree, dict):
        [tree] = _edited([tree], changes)
        lines = tree.items() if isinstance(tree, dict) else [("x", tree)]
        path.write_bytes(b"\n".join(dump(name) + b": " + dump(value) for name, value in lines))


def edited_header(path: Path, changes: Iterable[tuple]) -> None:
    """Change values in the header of a safetensors file; other files stay."""
    if path.suffix != ".safetensors":
        return
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        [header] = _edited([json.loads(data[8 : 8 + length])], changes)
    except (ValueError, RecursionError):
        return
    written = dump(header)
    path.write_bytes(len(written).to_bytes(8, "little") + written + data[8 + length :])


def _edited(trees: list, changes: Iterable[tuple]) -> list:
    for number, change in enumerate(changes if trees else ()):
        # Of many lines the first and the last are the ones that readers look at.
        place = -1 if number % 2 else 0
        trees[place] = edit(trees[place], change) if isinstance(trees[place], dict | list) else change[2]
    return trees


DEEPER: dict[str, Callable[[Path, Any], None]] = {
    "json": edited_json,
    "yaml": edited_yaml,
    "header": edited_header,
}
"""Kinds of damage that know a format: what each does to a file, which is left alone if it is of another."""
JSON = ("json", st.lists(edits(), min_size=1, max_size=2))
YAML = ("yaml", st.lists(edits(), min_size=1, max_size=2))
HEADER = ("header", st.lists(edits(), min_size=1, max_size=2))
