"""Sources of text: files in several formats, read as streams of pieces with bounded memory."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from inrank_megatron.config.folders import named_path
from inrank_megatron.data.cache import FileHashes
from inrank_megatron.data.json_files import JsonArray, JsonLines, JsonValues
from inrank_megatron.data.kinds import (
    ARRAY,
    ARROW_FILE,
    ARROW_STREAM,
    LINES,
    PARQUET,
    TEXT,
    VALUES,
    identify,
)
from inrank_megatron.data.pieces import Piece
from inrank_megatron.data.tables import ArrowFile, ArrowStream, ParquetTable
from inrank_megatron.data.text_file import TextFile
from inrank_megatron.errors import UserError

TABLES: dict[str, Callable[..., "Source"]] = {
    LINES: JsonLines,
    ARRAY: JsonArray,
    VALUES: JsonValues,
    PARQUET: ParquetTable,
    ARROW_FILE: ArrowFile,
    ARROW_STREAM: ArrowStream,
}


class Source(Protocol):
    """Text that can be read again and again: a name for messages, a content hash, the pieces in order.

    ``notes`` gets one-line remarks for the user while the pieces are read, each once.
    """

    @property
    def name(self) -> str: ...

    @property
    def notes(self) -> list[str]: ...

    def fingerprint(self, hashes: FileHashes) -> str: ...

    def pieces(self) -> Iterator[Piece]: ...


def open_source(path: str, *, text_column: str, document_separator: str | None = None) -> Source:
    """The source for one file, read as what it is by its name and content (`kinds.identify`).

    ``document_separator`` ends a document wherever it occurs, in texts and in the rows of tables.

    Raises UserError for a path that is missing, empty or no file, and for what is not read. The content
    beyond the first 64 KiB is checked while it is read.
    """
    file = named_path(str(path))
    if not file.exists():
        raise _missing(path, file)
    if not file.is_file():
        raise UserError(
            f"data path {path} is not a file; name its files, or load a folder with --dataset {path} (a pipe "
            "is read more than once: save it first)"
        )
    kind = identify(file)
    notes = list(kind.notes)
    if kind.format == TEXT:
        return TextFile(file, kind.compression, document_separator, notes)
    return TABLES[kind.format](file, text_column, kind.compression, document_separator, notes)


def _missing(path: str, file: Path) -> UserError:
    if file.is_symlink():
        fetch = "git annex get" if "annex/objects" in os.readlink(file) else "correct the link"
        return UserError(
            f"data path {path} is a link to {os.readlink(file)}, which does not exist; fetch the file "
            f"({fetch})"
        )
    halves = [half for suffix in (".bin", ".idx") if (half := Path(f"{file}{suffix}")).is_file()]
    if halves:
        return UserError(
            f"data path {path} does not exist, only {halves[0]}; a pair needs both its .bin and its .idx"
        )
    return UserError(
        f"data path {path} does not exist; a data path is a text, .jsonl or .parquet file or the prefix of a "
        ".bin/.idx pair: correct it or make the file"
    )
