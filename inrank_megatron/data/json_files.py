"""JSON in files: an object per line, an array of objects, or objects over several lines."""

import json
from collections.abc import Iterator
from typing import Any

from inrank_megatron.data.compression import opened
from inrank_megatron.data.rows import Table, checked_text, missing_column
from inrank_megatron.data.text_file import decoded, not_utf8
from inrank_megatron.errors import UserError

LONGEST_ROW = 2**28  # bytes, or characters of a JSON array: what one row may hold in memory
# An error so close to the end of what was read may be one of the end alone.
TOKEN = 16


class JsonLines(Table):
    """One JSON object per line. Line ends are those of any system; a blank line is none."""

    known = (None, "gzip", "xz")

    @property
    def label(self) -> str:
        return f"jsonl {self.compression is not None}"

    def rows(self) -> Iterator[str]:
        for number, line in enumerate(self._lines(), start=1):
            if not line.strip():
                continue
            where = f"{self.path}, line {number}"
            try:
                row = _loads(line)
            except UnicodeDecodeError as error:
                raise not_utf8(self.path, f"line {number}") from error
            except (ValueError, RecursionError) as error:
                raise malformed(where, error, "give one JSON object per line") from error
            yield text_of(row, where=where, column=self.column, remedy="give one JSON object per line")

    def _lines(self) -> Iterator[bytes]:
        with opened(self.path, self.compression) as stream:
            number = 0
            while line := stream.readline(LONGEST_ROW + 1):
                number += 1
                if len(line) > LONGEST_ROW:
                    raise UserError(
                        f"{self.path}, line {number}: is longer than {LONGEST_ROW:,} bytes; a row must fit "
                        "in memory: divide it"
                    )
                # No JSON string holds a carriage return, so one inside a line ends a line.
                yield from line.rstrip(b"\r\n").split(b"\r")


class JsonArray(Table):
    """A JSON array of objects, read one by one. ``closed``: it is in brackets, with commas.

    The standard decoder reads each object, as it reads JSON lines. (ijson gives "?" for half a surrogate
    pair, and takes memory by the square of the depth.)
    """

    label = "json array"
    closed = True

    def rows(self) -> Iterator[str]:
        for number, row in enumerate(self._values(), start=1):
            where = f"{self.path}, object {number}"
            yield text_of(row, where=where, column=self.column, remedy="give an array of JSON objects")

    def _values(self) -> Iterator[Any]:
        window = _Window(self)
        if self.closed:
            window.take("[")
            if window.next_character() == "]":
                window.take("]")
            else:
                yield window.value()
                while window.next_character() == ",":
                    window.take(",")
                    yield window.value()
                window.take("]")
        else:
            while window.next_character():
                yield window.value()
        if window.next_character():
            raise window.fault("more follows its end")


class JsonValues(JsonArray):
    """JSON objects one after the other, each over several lines."""

    label = "json values"
    closed = False


class _Window:
    """The part of a JSON text that is being read."""

    def __init__(self, table: JsonArray):
        self._table = table
        self._chunks = decoded(table.path, table.compression)
        self._text, self._at = "", 0
        self._passed = 0  # characters before the window

    def next_character(self) -> str:
        """The next one that is not white space, not taken yet; "" at the end."""
        while True:
            rest = len(self._text) - self._at
            stripped = self._text[self._at : self._at + TOKEN].lstrip(" \t\r\n")
            if stripped:
                self._at += min(rest, TOKEN) - len(stripped)
                return stripped[0]
            self._at += min(rest, TOKEN)
            if self._at == len(self._text) and not self._more():
                return ""

    def take(self, character: str) -> None:
        if self.next_character() != character:
            raise self.fault(f"{character!r} is missing")
        self._at += 1

    def value(self) -> Any:
        """The next value; more is read as long as it may lack its end only."""
        self.next_character()
        decoder = json.JSONDecoder()
        while True:
            try:
                value, self._at = decoder.raw_decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - TOKEN
                if not (cut and self._more()):
                    raise self.fault(error.msg, error.pos) from error
            except ValueError:  # an integer of more digits than Python takes
                decoder = json.JSONDecoder(parse_int=float)
            except RecursionError as error:
                raise self.fault("it is nested too deeply") from error

    def fault(self, what: str, at: int | None = None) -> UserError:
        place = self._passed + (self._at if at is None else at)
        return UserError(
            f"{self._table.path}: malformed JSON at character {place} ({what}); give a complete JSON array "
            "of objects, or one JSON object per line"
        )

    def _more(self) -> bool:
        """Read as much again as the window holds, so that long values are not decoded too often."""
        self._passed += self._at
        self._text, self._at = self._text[self._at :], 0
        if len(self._text) > LONGEST_ROW:
            raise UserError(
                f"{self._table.path}: an object is longer than {LONGEST_ROW:,} characters at character "
                f"{self._passed}; a row must fit in memory: divide it"
            )
        parts, size = [self._text], 0
        for chunk in self._chunks:
            parts.append(chunk)
            size += len(chunk)
            if size and size >= len(self._text):
                break
        self._text = "".join(parts)
        return size > 0


def text_of(row: object, *, where: str, column: str, remedy: str) -> str:
    """The text in a row that was read from JSON. Raises UserError for a row or value that is none."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}, not an object; {remedy}")
    if column not in row:
        raise missing_column(where, column, row)
    return checked_text(row[column], where=where, column=column)


def malformed(where: str, error: Exception, remedy: str) -> UserError:
    """The error for JSON that cannot be read; ``error`` is the decoder's."""
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
    return UserError(f"{where}: malformed JSON ({reason}); {remedy}")


def _loads(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:  # an integer of more digits than Python takes
        return json.loads(line, parse_int=float)
