"""Rows of a table as documents, or as the lines of one text where they are clearly that."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import ClassVar

from inrank_megatron.data.cache import FileHashes
from inrank_megatron.data.documents import document_pieces, note, watched
from inrank_megatron.data.pieces import LONGEST_PIECE, Piece
from inrank_megatron.errors import UserError

LAYOUT_ROWS = 256


@dataclass(frozen=True)
class Table(ABC):
    """A file of rows; ``column`` holds the text. Null is not text.

    ``notes`` gets one-line remarks for the user while the rows are read. A format defines `rows` and, for
    the fingerprint, ``label``.
    """

    path: Path
    column: str
    compression: str | None = None
    separator: str | None = None
    notes: list[str] = field(default_factory=list, compare=False)

    known: ClassVar[tuple[str | None, ...]] = ()  # compressions that earlier versions read this format in

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    @abstractmethod
    def label(self) -> str: ...

    def fingerprint(self, hashes: FileHashes) -> str:
        described = f"{self.label} {self.column} {hashes.sha256(self.path)}"
        if self.compression in self.known:
            return described + reading(self.rows(), self.separator)
        return described + separated(self.separator)

    def pieces(self) -> Iterator[Piece]:
        pieces = row_pieces(self.rows(), name=self.name, separator=self.separator, notes=self.notes)
        return watched(pieces, self.name, self.separator, self.notes)

    @abstractmethod
    def rows(self) -> Iterator[str]: ...


def row_pieces(
    rows: Iterable[str], *, name: str, separator: str | None = None, notes: list[str]
) -> Iterator[Piece]:
    """The pieces of a table's rows (JSON lines, parquet, a dataset): a row is a document, with one exception.

    Where the first 256 rows are single lines that end in a newline, with rows without text between them
    (WikiText's layout), the rows are the lines of one running text: an empty row is an empty line, and the
    text is cut into blocks. ``notes`` gets what was decided of such rows. Elsewhere rows without text are
    skipped, and only a row of more than 2^20 characters is cut. A ``separator`` ends documents in both.
    """
    rows = iter(rows)
    head = list(islice(rows, LAYOUT_ROWS))
    rows = chain(head, rows)
    if _are_lines(head) and _has_blanks(head):
        note(
            notes,
            f"{name}: its rows are lines with empty lines between them, so they are joined as one text; if "
            "each is a document, take the line ends off the rows",
        )
        yield from document_pieces(_joined_lines(rows, name, notes), separator)
        return
    if _are_lines(head) and len(head) > 1:
        note(
            notes,
            f"{name}: its first rows are single lines with their line ends; each row is a document: if they "
            "are the lines of one text, give that as a text file",
        )
    for row in rows:
        if row.strip():
            yield from document_pieces([row], separator, size=LONGEST_PIECE // 2)


def line_pieces(rows: Iterable[str], *, separator: str | None = None) -> Iterator[Piece]:
    """The pieces of rows that are the lines of one text, with or without their line ends."""
    return document_pieces((row if row.endswith("\n") else row + "\n" for row in rows), separator)


def reading(rows: Iterable[str], separator: str | None) -> str:
    """What a fingerprint says of how rows are read: nothing where earlier versions read them so too.

    They took single lines for the lines of one text also without an empty row among them.
    """
    head = list(islice(rows, LAYOUT_ROWS))
    documents = _are_lines(head) and not _has_blanks(head) and len(head) > 1
    return " rows" * documents + separated(separator)


def separated(separator: str | None) -> str:
    """What a fingerprint says of the separator."""
    return "" if separator is None else f" separator {separator!r}"


def _joined_lines(rows: Iterable[str], name: str, notes: list[str]) -> Iterator[str]:
    contradicted = False
    for number, row in enumerate(rows, start=1):
        if not contradicted and row.find("\n") not in (-1, len(row) - 1):
            contradicted = True
            note(notes, f"{name}: row {number} has several lines, though rows were taken for single lines")
        yield row if row.endswith("\n") else row + "\n"


def _are_lines(rows: list[str]) -> bool:
    texts = [row for row in rows if row]
    return bool(texts) and all(text.find("\n") == len(text) - 1 for text in texts)


def _has_blanks(rows: list[str]) -> bool:
    return any(not row.strip() for row in rows)


def checked_text(value: object, *, where: str, column: str, kind: str | None = None) -> str:
    """The text of a row; null is empty, bytes are UTF-8. ``kind``: what the table says of the column's type.

    Raises UserError for what is not text or not fit for UTF-8.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: {column!r} is not UTF-8 at its byte {error.start}; text must be UTF-8: convert or "
                "leave out the row"
            ) from error
    if not isinstance(value, str):
        described = f", the column's type {kind}" if kind else ""
        raise UserError(
            f"{where}: {column!r} is a {type(value).__name__}, not a string{described}; name the text's "
            "column with --text-column"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: {column!r} has half a surrogate pair at {error.start}; repair the row"
            ) from error
    return value


def missing_column(where: str, column: str, present: Collection[str]) -> UserError:
    """The error for a table without the text column; ``present`` lists the columns it has."""
    inner = column.split(".")[0] in present and "." in column
    nested = " (a field inside a column is not read: make it a column of its own)" if inner else ""
    return UserError(
        f"{where}: no column {column!r} among {sorted(present)}{nested}; name the text's with --text-column"
    )
