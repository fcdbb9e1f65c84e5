"""Hugging Face datasets, from the hub, the local cache (``HF_HUB_OFFLINE=1``) or a folder."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from inrank_megatron.data.cache import FileHashes
from inrank_megatron.data.corpus import Source, open_source
from inrank_megatron.data.documents import watched
from inrank_megatron.data.hub_names import LEGACY_NAMES
from inrank_megatron.data.pieces import Piece
from inrank_megatron.data.rows import (
    LAYOUT_ROWS,
    line_pieces,
    missing_column,
    reading,
    row_pieces,
    separated,
)
from inrank_megatron.data.tables import BATCH_ROWS, readable, texts
from inrank_megatron.errors import UserError
from inrank_megatron.pointers import refuse_pointer

SPLIT_NAMES = {"train": ("train",), "valid": ("validation", "valid", "val", "dev"), "test": ("test",)}
# What datasets takes .txt, .md and .raw for. It would give a line a row, or no text at all.
READ_HERE = ("text", "harbor", "audiofolder")


@dataclass(frozen=True)
class DatasetSplit:
    """One split of a dataset whose rows lie in memory-mapped Arrow files.

    ``lines``: the rows are the lines of text files, which datasets has taken the line ends off.
    """

    name: str
    column: str
    rows: Any  # datasets.Dataset; the library is imported only by runs that use it
    lines: bool = False
    separator: str | None = None
    notes: list[str] = field(default_factory=list, compare=False)

    def fingerprint(self, hashes: FileHashes) -> str:
        files = sorted(Path(entry["filename"]) for entry in self.rows.cache_files)
        contents = [hashes.sha256(file) for file in files] or [self.rows._fingerprint]
        described = f"dataset {self.column} {len(self.rows)} {' '.join(contents)}"
        if self.lines:
            return f"{described} lines{separated(self.separator)}"
        return described + reading(self._texts(), self.separator)

    def pieces(self) -> Iterator[Piece]:
        if self.lines:
            pieces = line_pieces(self._texts(), separator=self.separator)
        else:
            pieces = row_pieces(self._texts(), name=self.name, separator=self.separator, notes=self.notes)
        return watched(pieces, self.name, self.separator, self.notes)

    def has_lines(self, *, with_blanks: bool) -> bool:
        """Whether none of the first rows has a line end inside; ``with_blanks``: and some are blank.

        The latter for a dataset that may have been changed since its rows were lines of text files.
        """
        head = list(islice(self._texts(), LAYOUT_ROWS))
        lines = all(row.find("\n") in (-1, len(row) - 1) for row in head)
        return lines and (not with_blanks or any(not row.strip() for row in head))

    def _texts(self) -> Iterator[str]:
        tables = self.rows.select_columns([self.column]).with_format("arrow").iter(BATCH_ROWS)
        columns = (chunk for table in tables for chunk in table.column(0).chunks)
        with readable(self.name, "Arrow"):
            yield from texts(columns, name=self.name, column=self.column, notes=self.notes)


@dataclass(frozen=True)
class Files:
    """Files one after the other, each read as what it is."""

    name: str
    sources: tuple[Source, ...]
    remarks: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        return [*self.remarks, *(remark for source in self.sources for remark in source.notes)]

    def fingerprint(self, hashes: FileHashes) -> str:
        return "\n".join(source.fingerprint(hashes) for source in self.sources)

    def pieces(self) -> Iterator[Piece]:
        for source in self.sources:
            yield from source.pieces()


def load_splits(
    dataset: str, *, text_column: str, needed: str = "train", document_separator: str | None = None
) -> dict[str, Source]:
    """The splits "train", "valid" and "test" that the dataset ``name[:config]`` has; ``needed`` always.

    A folder is read as a dataset saved by ``save_to_disk`` or as a folder of data files, whose names say
    their splits as they do for datasets. Texts are read as `open_source` reads them. A dataset with one
    split only, of any name, gives it as ``needed``.

    Raises UserError for an unknown dataset or configuration, for one that cannot be reached, for a missing
    column and for a dataset without rows.
    """
    if Path(dataset).is_file():
        raise UserError(
            f"dataset {dataset} is a file; give it with --data-path, or its folder as the dataset"
        )
    loaded, remarks, saved = _load(dataset)
    if len(loaded) == 1:
        chosen = {needed: next(iter(loaded))}
    else:
        chosen = {role: name for role, names in SPLIT_NAMES.items() for name in names[::-1] if name in loaded}
    if needed not in chosen:
        raise UserError(
            f"dataset {dataset} has the splits {sorted(loaded)}, but {needed!r} is needed: choose another"
        )
    return {
        role: _split(
            f"{dataset} ({name})",
            loaded[name],
            text_column=text_column,
            separator=document_separator,
            remarks=remarks if role == needed else [],
            saved=saved,
        )
        for role, name in chosen.items()
    }


def _split(
    name: str, content: Any, *, text_column: str, separator: str | None, remarks: list[str], saved: bool
) -> Source:
    """The source for what `_load` gives of a split: a list of files, or a table of datasets."""
    if isinstance(content, list):
        sources = [
            open_source(file, text_column=text_column, document_separator=separator) for file in content
        ]
        return Files(name, tuple(sources), tuple(remarks))
    if text_column not in content.column_names:
        raise missing_column(f"dataset {name}", text_column, content.column_names)
    split = DatasetSplit(name, text_column, content, separator=separator, notes=list(remarks))
    if content.info.builder_name != "text" or not split.has_lines(with_blanks=saved):
        return split
    split.notes.append(f"{name}: its rows are the lines of text files; they are joined as one text")
    return replace(split, lines=True)


def _load(dataset: str) -> tuple[dict[str, Any], list[str], bool]:
    """Tables of datasets or lists of files by split, remarks, and whether they come from `save_to_disk`."""
    import datasets

    name, _, configuration = (dataset, "", "") if Path(dataset).is_dir() else dataset.partition(":")
    datasets.disable_progress_bars()
    try:
        saved = any((Path(name) / record).is_file() for record in ("dataset_dict.json", "state.json"))
        if saved:
            loaded, remarks = datasets.load_from_disk(name), list[str]()
        elif Path(name).is_dir():
            loaded, remarks = _load_folder(name, configuration or None)
        else:
            loaded, remarks = _load_named(name, configuration or None)
    except UserError:
        raise
    except Exception as error:  # of datasets, and of whatever library reads the format for it
        causes = [str(fault) or type(fault).__name__ for fault in (error, error.__cause__) if fault]
        reason = " ".join(": ".join(causes).split())
        raise UserError(
            f"dataset {dataset}{_place(name)} cannot be loaded ({reason}); give OWNER/NAME[:CONFIG] of a "
            "dataset on the hub or in the local cache, or a folder"
        ) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}, remarks, saved


def _load_named(name: str, configuration: str | None) -> tuple[Any, list[str]]:
    """From the hub or the cache, where a dataset may lie under the name that it had before."""
    import datasets

    if name in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:  # would read the current folder
        raise ValueError(f"{name} is a format, not a dataset")
    new = LEGACY_NAMES.get(name, name)
    old = next((old for old, now in LEGACY_NAMES.items() if now == new and not Path(old).exists()), None)
    failure: Exception | None = None
    for candidate in filter(None, (new, old)):
        try:
            loaded = datasets.load_dataset(candidate, configuration)
        except Exception as error:
            failure = failure or error
            continue
        if candidate == new:
            return loaded, [f"dataset {name} is {new} on the hub today; name it so"] * (new != name)
        return loaded, [f"dataset {name} is read from the local cache, where it lies as {old}"]
    assert failure is not None  # there is at least one candidate
    raise failure


def _load_folder(folder: str, configuration: str | None) -> tuple[Any, list[str]]:
    """A folder of data files: those of texts as lists, tables by datasets."""
    import datasets
    from datasets.data_files import DataFilesDict, get_data_patterns

    try:
        builder = datasets.load_dataset_builder(folder, configuration)
        found = {str(split): list(files) for split, files in builder.config.data_files.items()}
        by_line = getattr(builder.config, "sample_by", "line") == "line"  # else the folder's card says how
        read_here = builder.info.builder_name in READ_HERE and by_line
    except datasets.exceptions.DataFilesNotFoundError:  # none with a suffix that datasets knows
        patterns = DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder)
        found, read_here = {str(split): list(files) for split, files in patterns.items()}, True
    named = {file for files in found.values() for file in files}
    for file in named:
        refuse_pointer(Path(file))
    everything = DataFilesDict.from_patterns({"all": ["**"]}, base_path=folder)["all"]
    found_here = {os.path.realpath(file) for file in named}  # either may have followed a link, the other not
    left = sorted(file for file in everything if os.path.realpath(file) not in found_here)
    remarks = [f"dataset {folder}{place} is read, none of the hub"] if (place := _place(folder)) else []
    if left:
        remarks.append(f"dataset {folder}: {len(left)} of its files are left out, {left[0]} among them")
    if read_here:
        return found, remarks
    tables = datasets.load_dataset(folder, configuration)
    if _is_outdated(tables, named):
        tables = datasets.load_dataset(folder, configuration, download_mode="force_redownload")
    return tables, remarks


def _is_outdated(tables: Any, files: set[str]) -> bool:
    """Whether a file has changed since datasets made its tables of it, which it recognises by the
    modification time alone; nobody can set a change time back.
    """
    made = [
        os.stat(entry["filename"]).st_ctime_ns for split in tables.values() for entry in split.cache_files
    ]
    return bool(made) and max(os.stat(file).st_ctime_ns for file in files) >= min(made)


def _place(name: str) -> str:
    """Where a name that may be meant for the hub's is found here."""
    hub_like = name.count("/") <= 1 and not name.startswith((".", "/")) and not name.endswith("/")
    return f" (the local folder {Path(name).absolute()})" if hub_like and Path(name).is_dir() else ""
