"""Sources of text: files in several formats, read as streams of pieces with bounded memory."""

import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import pyarrow
import pyarrow.parquet

from inrank_megatron.data.cache import FileHashes
from inrank_megatron.data.pieces import Piece, cut_blocks, row_pieces
from inrank_megatron.errors import UserError

CHUNK_BYTES = 2**20
COMPRESSED = {".gz": gzip.open, ".xz": lzma.open}
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)


class Source(Protocol):
    """Text that can be read again and again: a name for messages, a content hash, the pieces in order."""

    name: str

    def fingerprint(self, hashes: FileHashes) -> str: ...

    def pieces(self) -> Iterator[Piece]: ...


@dataclass(frozen=True)
class TextFile:
    """A UTF-8 text file (plain, ``.gz`` or ``.xz``): one document, cut into blocks."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def fingerprint(self, hashes: FileHashes) -> str:
        return f"text {self.path.suffix in COMPRESSED} {hashes.sha256(self.path)}"

    def pieces(self) -> Iterator[Piece]:
        return cut_blocks(self._chunks())

    def _chunks(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        offset = 0
        for data in _chunks_of_bytes(self.path):
            try:
                yield decoder.decode(data)
            except UnicodeDecodeError as error:
                at = offset - (len(error.object) - len(data)) + error.start
                raise _not_utf8(self.path, f"byte {at}") from error
            offset += len(data)
        try:
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise _not_utf8(self.path, "its last byte") from error


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line (plain, ``.gz`` or ``.xz``); ``column`` holds the text. Null is no text."""

    path: Path
    column: str

    @property
    def name(self) -> str:
        return str(self.path)

    def fingerprint(self, hashes: FileHashes) -> str:
        return f"jsonl {self.path.suffix in COMPRESSED} {self.column} {hashes.sha256(self.path)}"

    def pieces(self) -> Iterator[Piece]:
        return row_pieces(self._rows())

    def _rows(self) -> Iterator[str]:
        for number, line in enumerate(_lines_of_bytes(self.path), start=1):
            if not line.strip():
                continue
            where = f"{self.path}, line {number}"
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise _not_utf8(self.path, f"line {number}") from error
            except ValueError as error:
                raise UserError(f"{where}: malformed JSON ({error}); give one JSON object a line") from error
            if not isinstance(row, dict):
                raise UserError(
                    f"{where}: a {type(row).__name__}, not an object; give one JSON object a line"
                )
            if self.column not in row:
                raise missing_column(where, self.column, row)
            yield checked_text(row[self.column], where=where, column=self.column)


@dataclass(frozen=True)
class ParquetTable:
    """A parquet file, read batch by batch; ``column`` holds the text. Null is no text."""

    path: Path
    column: str

    @property
    def name(self) -> str:
        return str(self.path)

    def fingerprint(self, hashes: FileHashes) -> str:
        return f"parquet {self.column} {hashes.sha256(self.path)}"

    def pieces(self) -> Iterator[Piece]:
        return row_pieces(self._rows())

    def _rows(self) -> Iterator[str]:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(self.path) as table:
                if self.column not in table.schema_arrow.names:
                    raise missing_column(self.name, self.column, table.schema_arrow.names)
                for batch in table.iter_batches(batch_size=1024, columns=[self.column]):
                    for text in batch.column(0).to_pylist():
                        number += 1
                        yield checked_text(text, where=f"{self.path}, row {number}", column=self.column)
        except pyarrow.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.path}: not readable as parquet ({reason}); give a whole parquet file"
            ) from error


def open_source(path: str, *, text_column: str) -> Source:
    """The source for one path; its suffix (``.jsonl``, ``.json``, ``.parquet``, else text) is its format.

    Raises UserError for a path that is missing, empty or a folder. The content is checked while it is read.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise UserError(
            f"data path {path} does not exist; a data path is a text, .jsonl or .parquet file or the prefix "
            "of a .bin/.idx pair: correct it or make the file"
        )
    if not file.is_file():
        raise UserError(
            f"data path {path} is not a file; name its files, or load a folder with --dataset {path}"
        )
    if file.stat().st_size == 0:
        raise UserError(f"data path {path} is empty; a corpus needs text: give a file that has some")
    plain_name = file.stem if file.suffix in COMPRESSED else file.name
    if plain_name.endswith((".jsonl", ".json")):
        return JsonLines(file, text_column)
    if plain_name.endswith(".parquet"):
        return ParquetTable(file, text_column)
    return TextFile(file)


def checked_text(value: object, *, where: str, column: str) -> str:
    """The text of a row; null is empty. Raises UserError for what is no text or not fit for UTF-8."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {column!r} is a {type(value).__name__}, not a string; name the text's column with "
            "--text-column"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: {column!r} has half a surrogate pair at {error.start}; repair the row"
            ) from error
    return value


def missing_column(where: str, column: str, present: object) -> UserError:
    """The error for a table without the text column; ``present`` lists the columns it has."""
    return UserError(
        f"{where}: no column {column!r} among {sorted(present)}; name the text's with --text-column"
    )


def _not_utf8(path: Path, where: str) -> UserError:
    return UserError(
        f"{path}: not UTF-8 at {where}; text must be UTF-8: convert it, e.g. with iconv -t UTF-8"
    )


def _open_bytes(path: Path) -> IO[bytes]:
    return COMPRESSED.get(path.suffix, open)(path, "rb")


def _chunks_of_bytes(path: Path) -> Iterator[bytes]:
    try:
        with _open_bytes(path) as stream:
            while data := stream.read(CHUNK_BYTES):
                yield data
    except DAMAGED as error:
        raise UserError(
            f"{path}: cannot be decompressed ({error}); give a whole {path.suffix} file"
        ) from error


def _lines_of_bytes(path: Path) -> Iterator[bytes]:
    try:
        with _open_bytes(path) as stream:
            yield from stream
    except DAMAGED as error:
        raise UserError(
            f"{path}: cannot be decompressed ({error}); give a whole {path.suffix} file"
        ) from error
