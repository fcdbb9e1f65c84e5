"""From the data section of a run's settings to token files, made once and shared by all who ask for them."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from inrank_megatron.data.batches import unigram_perplexity
from inrank_megatron.data.cache import (
    FileHashes,
    Progress,
    file_sha256,
    locked,
    publish,
    quiet,
    read_json,
    write_json,
)
from inrank_megatron.data.sources import Selection, TokenPrefix, select, split_bounds
from inrank_megatron.data.token_file import TokenFile, TokenStore, beside, joined, write_tokens
from inrank_megatron.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from inrank_megatron.errors import UserError
from inrank_megatron.schema import DataConfig

FORMAT_VERSION = 2
SUFFIXES = (".bin", ".idx", ".words.npy")

_log = logging.getLogger(__name__)


class _Unusable(Exception):
    """A cache folder that is not what its record says; the message says why."""


@dataclass(frozen=True, eq=False)
class PreparedData:
    """The tokens of a run.

    Attributes:
        tokenizer: with the true vocabulary size.
        train: token files and their weights in the blend, which sum to 1.
        valid, test: all their text as one token file; None where a share is 0 or holds nothing.
        folder: where the token files, the tokenizer and ``meta.json`` lie.
        meta: the content of ``meta.json``; ``meta["splits"]`` has the counts of each split,
            ``meta["unigram_perplexity"]`` that of the training tokens' frequencies on the held-out splits.
    """

    tokenizer: Tokenizer
    train: list[tuple[TokenFile, float]]
    valid: TokenFile | None
    test: TokenFile | None
    folder: Path
    meta: dict[str, Any]


def prepare(
    data: DataConfig, *, progress: Progress = quiet, choose: Callable[[DataConfig], Selection] = select
) -> PreparedData:
    """The token files for the settings: those in ``data_cache_path/<key>`` if whole, else made there.

    The key is a hash of the content of all sources, their splits and order, and the tokenizer. Any number of
    processes may call this at once: one makes the files, the others wait and use them. A folder that an
    interruption or damage left unusable is made again. Without a tokenizer in the settings, a BPE of
    ``vocab_size`` tokens is trained on the train split. ``choose`` says which texts are meant, if not all
    that a run would use.

    Raises UserError for every fault of the sources, the tokenizer or the cache folder that the user can mend.
    """
    cache = Path(data.data_cache_path).expanduser()
    try:
        hashes = FileHashes(cache / "hashes")
        with locked(cache / "sources.lock", progress=progress):
            selection = choose(data)
            tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
            key = _key(selection, tokenizer, data.vocab_size, hashes)
        with locked(cache / f"{key}.lock", progress=progress):
            return _load_or_build(
                cache / key, selection, tokenizer, data=data, hashes=hashes, progress=progress
            )
    except OSError as error:
        raise UserError(
            f"data cannot be prepared in {cache}: {error}; its folder must be writable and its inputs "
            "readable: mend that or choose another --data-cache-path"
        ) from error


def _load_or_build(
    folder: Path,
    selection: Selection,
    tokenizer: Tokenizer | None,
    *,
    data: DataConfig,
    hashes: FileHashes,
    progress: Progress,
) -> PreparedData:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # the lock is held: what lies there was interrupted
    if folder.exists():
        try:
            return _load(folder, selection, hashes)
        except _Unusable as fault:
            _log.warning("the token files in %s are unusable (%s); making them again", folder, fault)
            shutil.rmtree(folder)
    try:
        partial.mkdir(parents=True)
        _build(partial, selection, tokenizer, data=data, progress=progress)
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _load(folder, selection, hashes)


def _build(
    folder: Path, selection: Selection, tokenizer: Tokenizer | None, *, data: DataConfig, progress: Progress
) -> None:
    """Write the tokenizer, the token files and, last, their record ``meta.json`` into the empty folder."""
    if tokenizer is None:
        progress("training the tokenizer", None)
        tokenizer = train_tokenizer(_train_texts(selection), vocab_size=data.vocab_size)
    tokenizer.save(folder / "tokenizer")
    records = []
    for number, part in enumerate(selection.parts):
        prefix = _prefix(folder, selection, number)
        if not isinstance(part.source, TokenPrefix):
            pieces, name = part.source.pieces(), part.source.name
            write_tokens(prefix, pieces, tokenizer=tokenizer, name=name, progress=progress)
        progress(f"checking {part.source.name}", None)
        records.append({"split": part.split} | _checked_record(prefix, part.source.name, tokenizer))
    train, valid, test = _assemble(folder, selection)
    whole = {"train": joined([file for file, _ in train]), "valid": valid, "test": test}
    meta = {
        "format_version": FORMAT_VERSION,
        "splits": {split: file.counts() for split, file in whole.items() if file is not None},
        "unigram_perplexity": {
            split: unigram_perplexity(train, file, vocab_size=tokenizer.vocab_size)
            for split, file in (("valid", valid), ("test", test))
            if file is not None
        },
        "shares": list(selection.shares),
        "files": records,
        "tokenizer": {
            "name": data.tokenizer or "trained on the train split",
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "identity": tokenizer.identity,
        },
    }
    write_json(folder / "meta.json", meta)


def _train_texts(selection: Selection) -> Iterator[str]:
    """The text of the train split; a source that is cut by position is read once more, to be counted."""
    for part in selection.parts:
        if part.split != "train":
            continue
        if isinstance(part.source, TokenPrefix):
            raise UserError(
                f"{part.source.name} holds tokens, so no tokenizer can be trained on it; name the one that "
                "made them with --tokenizer"
            )
        count = None
        if selection.shares[0] < 1:
            count = split_bounds(sum(1 for _ in part.source.pieces()), selection.shares)[1]
        for piece in islice(part.source.pieces(), count):
            yield piece.text


def _checked_record(prefix: Path, name: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """What ``meta.json`` says of one pair of files. Raises UserError for ids outside the vocabulary."""
    store = TokenStore(prefix, name=name)
    largest = store.largest_id()
    if largest >= tokenizer.vocab_size:
        raise UserError(
            f"{name} holds the token id {largest}; ids must be below the tokenizer's vocabulary of "
            f"{tokenizer.vocab_size}: give the --tokenizer that made the tokens"
        )
    files = {suffix: beside(prefix, suffix) for suffix in SUFFIXES}
    return {
        "source": name,
        "largest_id": largest,
        "sha256": {suffix: file_sha256(path) for suffix, path in files.items() if path.is_file()},
        **store.sequences(0, store.num_sequences).counts(),
    }


def _load(folder: Path, selection: Selection, hashes: FileHashes) -> PreparedData:
    meta = read_json(folder / "meta.json")
    if meta is None or meta.get("format_version") != FORMAT_VERSION:
        raise _Unusable("meta.json is missing or not of this version")
    if not {"files", "splits", "unigram_perplexity", "tokenizer"} <= meta.keys():
        raise _Unusable("meta.json is not whole")
    if len(meta["files"]) != len(selection.parts):
        raise _Unusable("meta.json records other files")
    for number, record in enumerate(meta["files"]):
        prefix = _prefix(folder, selection, number)
        for suffix, digest in record.get("sha256", {}).items():
            path = beside(prefix, suffix)
            if not path.is_file() or hashes.sha256(path) != digest:
                raise _Unusable(f"{path.name} is not what was written")
    try:
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
    except UserError as error:
        raise _Unusable(str(error)) from error
    if tokenizer.identity != meta["tokenizer"].get("identity"):
        raise _Unusable("the tokenizer is not the one that was saved")
    train, valid, test = _assemble(folder, selection)
    return PreparedData(tokenizer, train, valid, test, folder, meta)


def _assemble(
    folder: Path, selection: Selection
) -> tuple[list[tuple[TokenFile, float]], TokenFile | None, TokenFile | None]:
    train, held_out = [], {"valid": [], "test": []}
    for number, part in enumerate(selection.parts):
        store = TokenStore(_prefix(folder, selection, number), name=part.source.name)
        if part.split != "train":
            held_out[part.split].append(store.sequences(0, store.num_sequences))
            continue
        bounds = split_bounds(store.num_sequences, selection.shares)
        share, *others = (store.sequences(first, last) for first, last in pairwise(bounds))
        train.append((share, share.num_tokens if part.weight is None else part.weight))
        for split, file in zip(("valid", "test"), others, strict=True):
            held_out[split].append(file)
    total = sum(weight for _, weight in train)
    return (
        [(file, weight / total) for file, weight in train],
        joined(held_out["valid"]),
        joined(held_out["test"]),
    )


def _prefix(folder: Path, selection: Selection, number: int) -> Path:
    part = selection.parts[number]
    return (
        part.source.prefix if isinstance(part.source, TokenPrefix) else folder / f"{part.split}-{number:02d}"
    )


def _key(selection: Selection, tokenizer: Tokenizer | None, vocab_size: int, hashes: FileHashes) -> str:
    described = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.identity if tokenizer else f"byte-level BPE of {vocab_size}",
        "shares": selection.shares,
        "parts": [(part.split, part.source.fingerprint(hashes)) for part in selection.parts],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
