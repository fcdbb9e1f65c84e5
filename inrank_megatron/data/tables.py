"""Parquet and Arrow files."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pyarrow
import pyarrow.parquet

from inrank_megatron.data.compression import opened, opened_for_seeking
from inrank_megatron.data.documents import note
from inrank_megatron.data.rows import Table, checked_text, missing_column
from inrank_megatron.errors import UserError

BATCH_ROWS = 1024


class _ArrowTable(Table):
    def _texts(self, columns: Iterable[pyarrow.Array]) -> Iterator[str]:
        return texts(columns, name=self.name, column=self.column, notes=self.notes)


class ParquetTable(_ArrowTable):
    """A parquet file, read batch by batch."""

    label = "parquet"
    known = (None,)

    def rows(self) -> Iterator[str]:
        with (
            opened_for_seeking(self.path, self.compression) as stream,
            readable(self.name, "parquet"),
            pyarrow.parquet.ParquetFile(stream) as table,
        ):
            check_column(table.schema_arrow.names, self.column, where=self.name)
            batches = table.iter_batches(batch_size=BATCH_ROWS, columns=[self.column])
            yield from self._texts(batch.column(0) for batch in batches)


class ArrowFile(_ArrowTable):
    """An Arrow (Feather) file, read batch by batch."""

    label = "arrow"

    def rows(self) -> Iterator[str]:
        with (
            opened_for_seeking(self.path, self.compression) as stream,
            readable(self.name, "Arrow"),
            pyarrow.ipc.open_file(stream) as reader,
        ):
            check_column(reader.schema.names, self.column, where=self.name)
            batches = map(reader.get_batch, range(reader.num_record_batches))
            yield from self._texts(batch.column(self.column) for batch in batches)


class ArrowStream(_ArrowTable):
    """An Arrow stream, as datasets writes it, read batch by batch."""

    label = "arrow"

    def rows(self) -> Iterator[str]:
        with (
            opened(self.path, self.compression) as stream,
            readable(self.name, "Arrow"),
            pyarrow.ipc.open_stream(stream) as reader,
        ):
            check_column(reader.schema.names, self.column, where=self.name)
            yield from self._texts(batch.column(self.column) for batch in reader)


def texts(columns: Iterable[pyarrow.Array], *, name: str, column: str, notes: list[str]) -> Iterator[str]:
    """The texts of a column given in parts: strings of any Arrow type, or bytes that are UTF-8.

    Arrow does not check that strings are UTF-8; here they are decoded one by one. Raises UserError with the
    row (from 1) and its byte, and for a column of another type.
    """
    number = 0
    for part in columns:
        if _is_bytes(part.type):
            note(notes, f"{name}: the column {column!r} is binary; its bytes are read as UTF-8 text")
        for start in range(0, len(part), BATCH_ROWS):
            for value in _values(part.slice(start, BATCH_ROWS)):
                number += 1
                yield checked_text(value, where=f"{name}, row {number}", column=column, kind=str(part.type))


def check_column(names: list[str], column: str, *, where: str) -> None:
    """Raises UserError unless the table has exactly one such column."""
    if column not in names:
        raise missing_column(where, column, names)
    if names.count(column) > 1:
        raise UserError(f"{where}: has {names.count(column)} columns {column!r}; leave one of that name")


def _values(array: pyarrow.Array) -> list:
    """The values as Python has them, but strings as their bytes; damaged offsets and indices are found."""
    if isinstance(array, pyarrow.ExtensionArray):
        array = array.storage
    if pyarrow.types.is_dictionary(array.type) and _is_text(array.type.value_type):
        values = array.dictionary.cast(pyarrow.large_binary())
        values.validate(full=True)
        array = pyarrow.DictionaryArray.from_arrays(array.indices, values).dictionary_decode()
    if _is_text(array.type):
        array = array.cast(pyarrow.large_binary())
    array.validate(full=True)
    return array.to_pylist()


def _is_text(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    strings = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return strings or _is_bytes(kind)


def _is_bytes(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    variable = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return variable or types.is_fixed_size_binary(kind)


@contextmanager
def readable(name: str, form: str) -> Iterator[None]:
    """Raises UserError for what Arrow cannot read."""
    try:
        yield
    # Damage may also claim names that are not UTF-8, and more than there is memory.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        # Arrow raises an OSError without a number for what it cannot read.
        if getattr(error, "errno", None) is not None:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: not readable as {form} ({reason}); give a complete {form} file") from error
