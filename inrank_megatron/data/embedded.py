"""English text that every Python installation carries: the standard library's documentation.

A document is one topic of ``pydoc`` or one module's docstrings, each under its dotted name. Sources are
parsed, never imported. The order is that of the sorted names, a docstring appears once in the whole corpus,
and a document's split follows from a hash of its own text, so nothing depends on the file system.
"""

import ast
import hashlib
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from inrank_megatron.data.cache import FileHashes
from inrank_megatron.data.pieces import LONGEST_PIECE, Piece, cut_blocks
from inrank_megatron.errors import UserError

TEST_FOLDERS = {"test", "tests", "idle_test"}
VALID_PERCENT, TEST_PERCENT = 5, 5
DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class EmbeddedText:
    """One split ("train", "valid" or "test": about 90, 5 and 5 per cent) of the embedded corpus."""

    split: str
    notes: list[str] = field(default_factory=list, compare=False)

    @property
    def name(self) -> str:
        return f"embedded corpus ({self.split})"

    def fingerprint(self, hashes: FileHashes) -> str:
        return f"embedded {self.split} {_sources_digest()}"

    def pieces(self) -> Iterator[Piece]:
        for document in embedded_documents():
            if split_of(document) == self.split:
                yield from cut_blocks([document], size=LONGEST_PIECE // 2)


def split_of(document: str) -> str:
    """The split that a document belongs to, from its SHA-256 alone."""
    percent = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") % 100
    if percent < VALID_PERCENT:
        return "valid"
    return "test" if percent < VALID_PERCENT + TEST_PERCENT else "train"


@cache
def embedded_documents() -> tuple[str, ...]:
    """All documents (about 2 MB). Parsing takes two seconds, so a process does it once."""
    seen: set[str] = set()
    documents = [text for file in _source_files() if (text := _module_document(file, seen))]
    return tuple(sorted(set(_topics())) + documents)


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart; the docstrings are the larger part
        return []
    return [text.strip() + "\n" for text in topics.values()]


def _module_document(file: Path, seen: set[str]) -> str:
    """The module's docstrings that are not in ``seen``, each after its dotted name; ``seen`` grows."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escape sequences in the standard library's own strings
            tree = ast.parse(file.read_bytes())
    except SyntaxError:  # templates that only look like Python
        return ""
    relative = file.relative_to(_library()).with_suffix("")
    module = ".".join(part for part in relative.parts if part != "__init__")
    sections = []
    for name, text in _docstrings(tree, module):
        if text not in seen:
            seen.add(text)
            sections.append(f"{name}\n\n{text}\n")
    return "\n".join(sections)


def _docstrings(node: Any, name: str) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node)
    if text and text.strip():
        yield name, _printable(text.strip())
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DOCUMENTED):
            yield from _docstrings(child, f"{name}.{child.name}")


def _printable(text: str) -> str:
    """The text without lone surrogates and NUL characters, which a few docstrings show as examples."""
    return text.encode("utf-8", "ignore").decode().replace("\0", "")


@cache
def _sources_digest() -> str:
    digest = hashlib.sha256()
    for file in _source_files():
        digest.update(f"{file.relative_to(_library()).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    for text in sorted(set(_topics())):
        digest.update(text.encode())
    return digest.hexdigest()


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@cache
def _source_files() -> tuple[Path, ...]:
    names = sorted(sys.stdlib_module_names - TEST_FOLDERS)
    files: list[Path] = []
    for name in names:
        files += (_library() / name).rglob("*.py")
        files += [file for file in [_library() / f"{name}.py"] if file.is_file()]
    kept = [file for file in files if not TEST_FOLDERS & set(file.relative_to(_library()).parts[:-1])]
    if not kept:
        raise UserError(
            f"no Python sources under {_library()}; the embedded corpus is made from them: install the "
            "standard library's sources or name a corpus with --data-path or --dataset"
        )
    return tuple(sorted(kept, key=lambda file: file.relative_to(_library()).as_posix()))
