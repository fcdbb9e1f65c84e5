"""Hugging Face datasets, from the hub, the local cache (``HF_HUB_OFFLINE=1``) or a folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inrank_megatron.data.cache import FileHashes
from inrank_megatron.data.corpus import checked_text, missing_column
from inrank_megatron.data.pieces import Piece, row_pieces
from inrank_megatron.errors import UserError

SPLIT_NAMES = {"train": ("train",), "valid": ("validation", "valid", "val", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class DatasetSplit:
    """One split of a dataset whose rows lie in memory-mapped Arrow files."""

    name: str
    column: str
    rows: Any  # datasets.Dataset; the library is imported only by runs that use it

    def fingerprint(self, hashes: FileHashes) -> str:
        files = sorted(Path(entry["filename"]) for entry in self.rows.cache_files)
        contents = [hashes.sha256(file) for file in files] or [self.rows._fingerprint]
        return f"dataset {self.column} {len(self.rows)} {' '.join(contents)}"

    def pieces(self) -> Iterator[Piece]:
        return row_pieces(self._texts())

    def _texts(self) -> Iterator[str]:
        texts = self.rows.select_columns([self.column])
        for number, row in enumerate(texts, start=1):
            yield checked_text(row[self.column], where=f"{self.name}, row {number}", column=self.column)


def load_splits(dataset: str, *, text_column: str, needed: str = "train") -> dict[str, DatasetSplit]:
    """The splits "train", "valid" and "test" that the dataset ``name[:config]`` has; ``needed`` always.

    A folder is read as a dataset saved by ``save_to_disk`` or as a folder of data files. A dataset with one
    split only, of any name, gives it as ``needed``. Raises UserError for an unknown dataset or configuration,
    for one that cannot be reached, for a missing column and for a dataset without rows.
    """
    loaded = _load(dataset)
    if len(loaded) == 1:
        chosen = {needed: next(iter(loaded))}
    else:
        chosen = {role: name for role, names in SPLIT_NAMES.items() for name in names[::-1] if name in loaded}
    if needed not in chosen:
        raise UserError(
            f"dataset {dataset} has the splits {sorted(loaded)}, but {needed!r} is needed: choose another"
        )
    splits = {}
    for role, name in chosen.items():
        rows = loaded[name]
        if text_column not in rows.column_names:
            raise missing_column(f"dataset {dataset}, split {name}", text_column, rows.column_names)
        splits[role] = DatasetSplit(f"{dataset} ({name})", text_column, rows)
    return splits


def _load(dataset: str) -> dict[str, Any]:
    import datasets

    name, _, configuration = (dataset, "", "") if Path(dataset).is_dir() else dataset.partition(":")
    datasets.disable_progress_bars()
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"dataset {dataset} cannot be loaded ({reason}); give name[:config] of a dataset on the hub or "
            "in the local cache, or a folder"
        ) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
