"""What lies in a cache folder: token files, their record and the tokenizer, made and checked."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from inrank_megatron.config.schema import DataConfig
from inrank_megatron.data.batches import unigram_perplexity
from inrank_megatron.data.cache import FileHashes, Progress, file_sha256, read_json, write_json
from inrank_megatron.data.pieces import Piece
from inrank_megatron.data.sources import SPLITS, Part, Selection, TokenPrefix, cut
from inrank_megatron.data.token_file import TokenFile, joined, pair_file, several, write_tokens
from inrank_megatron.data.token_store import TokenStore
from inrank_megatron.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from inrank_megatron.errors import UserError

FORMAT_VERSION = 2
SUFFIXES = (".bin", ".idx", ".words.npy")

Splits = tuple[list[tuple[TokenFile, float]], TokenFile | None, TokenFile | None]
"""Train files with their weights in the blend, which sum to 1; valid; test."""


class Unusable(Exception):
    """A cache folder that is not what its record says; the message says why."""


def build(
    folder: Path, selection: Selection, tokenizer: Tokenizer | None, *, data: DataConfig, progress: Progress
) -> None:
    """Write the tokenizer, the token files and, last, their record into the empty folder."""
    if tokenizer is None:
        progress("training the tokenizer", None)
        tokenizer = train_tokenizer(
            _train_texts(selection),
            vocab_size=data.vocab_size,
            parse_special_tokens=data.parse_special_tokens,
        )
    tokenizer.save(folder / "tokenizer")
    records = []
    for numbers in _stored_together(selection):
        name, prefix = _names(selection, numbers), _prefix(folder, selection, numbers)
        sources = _written(prefix, selection, numbers, tokenizer=tokenizer, progress=progress)
        progress(f"checking {name}", None)
        record = {"split": selection.parts[numbers[0]].split} | _checked(prefix, name, tokenizer)
        records.append(record | {"sources": sources})
    train, valid, test = _assembled(folder, selection, records)
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


def load(folder: Path, selection: Selection, hashes: FileHashes) -> tuple[Tokenizer, Splits, dict[str, Any]]:
    """The tokenizer, the splits and the record. Raises `Unusable` unless all is what was written."""
    meta = read_json(folder / "meta.json")
    if meta is None or meta.get("format_version") != FORMAT_VERSION:
        raise Unusable("meta.json is missing or not of this version")
    if not {"files", "splits", "unigram_perplexity", "tokenizer"} <= meta.keys():
        raise Unusable("meta.json is not complete")
    try:
        _check_record(folder, selection, meta["files"], hashes)
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
        if tokenizer.identity != meta["tokenizer"].get("identity"):
            raise Unusable("the tokenizer is not the one that was saved")
        return tokenizer, _assembled(folder, selection, meta["files"]), meta
    except UserError as error:
        raise Unusable(str(error)) from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Unusable(f"meta.json makes no sense ({error!r})") from error


def notes_of(meta: dict[str, Any], selection: Selection) -> list[str]:
    """What the sources had to say when they were opened and, in the record, while they were read; equal
    remarks on several sources are one.
    """
    sources: dict[str, dict[str, None]] = {}
    for part in selection.parts:
        for note in part.remarks:
            sources.setdefault(note.removeprefix(f"{part.source.name}: "), {})[part.source.name] = None
    for record in meta["files"]:
        for entry in record.get("sources", []):
            for note in entry.get("notes", []):
                name = selection.parts[entry["part"]].source.name
                sources.setdefault(note.removeprefix(f"{entry['name']}: "), {})[name] = None
    said = [f"{several(list(names))}: {remark}" for remark, names in sources.items()]
    shares = dict(zip(SPLITS, selection.shares, strict=True))
    empty = [split for split in SPLITS if shares[split] > 0 and split not in meta["splits"]]
    return said + ([f"no text is left for {' and '.join(empty)}: {too_few(meta)}"] if empty else [])


def too_few(meta: dict[str, Any]) -> str:
    """Why a split holds nothing although it has a share of the text."""
    documents = sum(count for parts in _layout(meta["files"]) for count in parts.values())
    return f"--split cuts between documents, and the text has only {documents}"


def _stored_together(selection: Selection) -> list[list[int]]:
    """The numbers of the parts that lie in one pair of files: all texts of a split, and each given pair."""
    groups: dict[Any, list[int]] = {}
    for number, part in enumerate(selection.parts):
        given = isinstance(part.source, TokenPrefix)
        groups.setdefault(number if given else part.split, []).append(number)
    return list(groups.values())


def _written(
    prefix: Path, selection: Selection, numbers: list[int], *, tokenizer: Tokenizer, progress: Progress
) -> list[dict[str, Any]]:
    """Write the texts of these parts into one pair; the part, name, sequences and notes of each in turn."""
    parts = [selection.parts[number] for number in numbers]
    sources: list[Any] = [part.source for part in parts]  # of one kind: texts, or one pair
    counts = [0] * len(sources)

    def pieces() -> Iterator[Piece]:
        for index, source in enumerate(sources):
            for piece in source.pieces():
                counts[index] += 1
                yield piece

    if isinstance(sources[0], TokenPrefix):
        counts = [TokenStore(prefix, name=sources[0].name).num_sequences]
    else:
        name = _names(selection, numbers)
        write_tokens(prefix, pieces(), tokenizer=tokenizer, name=name, progress=progress)
    return [
        {"part": number, "name": part.source.name, "sequences": count} | _notes(part, count)
        for number, part, count in zip(numbers, parts, counts, strict=True)
    ]


def _notes(part: Part, sequences: int) -> dict[str, list[str]]:
    """Without the remarks of its opening: another name may come to the same token files later."""
    notes = [note for note in getattr(part.source, "notes", ()) if note not in part.remarks]
    notes += [] if sequences else ["holds no text"]
    return {"notes": notes} if notes else {}


def _train_texts(selection: Selection) -> Iterator[str]:
    """The text of the train split; sources that are cut are read once more, to be counted."""
    for numbers in selection.components():
        sources: list[Any] = [selection.parts[number].source for number in numbers]
        for source in sources:
            if isinstance(source, TokenPrefix):
                raise UserError(
                    f"{source.name} holds tokens, so no tokenizer can be trained on it; name the one that "
                    "made them with --tokenizer"
                )
        stops: list[int | None] = [None] * len(sources)
        if selection.shares[0] < 1:
            counts = [sum(1 for _ in source.pieces()) for source in sources]
            stops = [bounds[1] for bounds in cut(counts, selection.shares)]
        for source, stop in zip(sources, stops, strict=True):
            for piece in islice(source.pieces(), stop):
                yield piece.text


def _checked(prefix: Path, name: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """What ``meta.json`` says of one pair of files. Raises UserError for ids outside the vocabulary."""
    store = TokenStore(prefix, name=name)
    largest = store.largest_id()
    if largest >= tokenizer.vocab_size:
        raise UserError(
            f"{name} holds the token id {largest}; ids must be below the tokenizer's vocabulary of "
            f"{tokenizer.vocab_size}: give the --tokenizer that made the tokens"
        )
    files = {suffix: pair_file(prefix, suffix) for suffix in SUFFIXES}
    return {
        "source": name,
        "largest_id": largest,
        "sha256": {suffix: file_sha256(path) for suffix, path in files.items() if path.is_file()},
        **store.sequences(0, store.num_sequences).counts(),
    }


def _check_record(folder: Path, selection: Selection, records: list[dict], hashes: FileHashes) -> None:
    """Each part is in one pair of files, and every file has the content that it had."""
    layout = _layout(records)
    if sorted(number for parts in layout for number in parts) != list(range(len(selection.parts))):
        raise Unusable("meta.json records other files")
    for record, parts in zip(records, layout, strict=True):
        prefix = _prefix(folder, selection, list(parts))
        for suffix, digest in record.get("sha256", {}).items():
            path = pair_file(prefix, suffix)
            if not path.is_file() or hashes.sha256(path) != digest:
                raise Unusable(f"{path.name} is not what was written")


def _layout(records: list[dict]) -> list[dict[int, int]]:
    """The parts in each pair of files, with their sequences. Earlier versions made a pair for each part."""
    return [
        {part["part"]: part["sequences"] for part in record["sources"]}
        if "sources" in record
        else {number: record["sequences"]}
        for number, record in enumerate(records)
    ]


def _assembled(folder: Path, selection: Selection, records: list[dict]) -> Splits:
    """The parts, cut and joined. Each pair's index is dropped when its parts are known."""
    layout = _layout(records)
    bounds = _bounds(selection, {number: count for parts in layout for number, count in parts.items()})
    files: dict[int, list[TokenFile]] = {}
    for parts in layout:
        store = TokenStore(_prefix(folder, selection, list(parts)), name=_names(selection, list(parts)))
        if store.num_sequences != sum(parts.values()) or min(parts.values()) < 0:
            raise Unusable(f"{store.name} has {store.num_sequences} sequences, not those of the record")
        start = 0
        for number, count in parts.items():
            name = selection.parts[number].source.name
            edges = pairwise(start + bound for bound in bounds[number])
            files[number] = [replace(store.sequences(first, last), name=name) for first, last in edges]
            start += count
    train = []
    for numbers in selection.components():
        shares, weight = [files[number][0] for number in numbers], selection.parts[numbers[0]].weight
        if (share := joined(shares)) is None:
            raise UserError(f"{_names(selection, numbers)} holds no text to train on; correct it or --split")
        train.append((share, share.num_tokens if weight is None else weight))
    total = sum(weight for _, weight in train)
    valid, test = (joined([files[number][index] for number in sorted(files)]) for index in (1, 2))
    return [(file, weight / total) for file, weight in train], valid, test


def _bounds(selection: Selection, counts: dict[int, int]) -> dict[int, list[int]]:
    """Where each part is cut into train, valid and test."""
    bounds = {}
    for number, part in enumerate(selection.parts):
        train, valid = counts[number] * (part.split == "train"), counts[number] * (part.split != "test")
        bounds[number] = [0, train, valid, counts[number]]
    for numbers in selection.components():
        cuts = cut([counts[number] for number in numbers], selection.shares)
        bounds |= zip(numbers, cuts, strict=True)
    return bounds


def _names(selection: Selection, numbers: list[int]) -> str:
    return several([selection.parts[number].source.name for number in numbers])


def _prefix(folder: Path, selection: Selection, numbers: list[int]) -> Path:
    part = selection.parts[numbers[0]]
    if isinstance(part.source, TokenPrefix):
        return part.source.prefix
    return folder / f"{part.split}-{numbers[0]:02d}"
