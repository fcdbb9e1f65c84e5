"""From the data section of a run's settings to token files, made once and shared by all who ask for them."""

import errno
import hashlib
import json
import logging
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inrank_megatron.config.folders import named_folder
from inrank_megatron.config.schema import DataConfig
from inrank_megatron.data.building import SOURCES_LOCK, building, discard, locked
from inrank_megatron.data.cache import FileHashes, Progress, quiet
from inrank_megatron.data.contents import FORMAT_VERSION, Unusable, build, load, notes_of
from inrank_megatron.data.sources import Selection, select
from inrank_megatron.data.token_file import TokenFile, several
from inrank_megatron.data.tokenizer import Tokenizer, load_tokenizer
from inrank_megatron.errors import UserError

_log = logging.getLogger(__name__)


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
        notes: what the user may want to know of the sources and the tokenizer, a line each.
    """

    tokenizer: Tokenizer
    train: list[tuple[TokenFile, float]]
    valid: TokenFile | None
    test: TokenFile | None
    folder: Path
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()


def prepare(
    data: DataConfig,
    *,
    progress: Progress = quiet,
    choose: Callable[[DataConfig], Selection] = select,
    recorded: str | None = None,
) -> PreparedData:
    """The token files for the settings: those in ``data_cache_path/<key>`` if complete, else made there.

    The key is a hash of the content of all sources, their splits and order, and the tokenizer. Any number of
    processes may call this at once: one makes the files, the others wait and use them. A complete folder is
    only read, so it may be another user's or on a read-only mount. A folder that an interruption or damage
    left unusable is made again. Without a tokenizer in the settings, a BPE of ``vocab_size`` tokens is
    trained on the train split.

    Args:
        choose: which texts are meant, if not all that a run would use.
        recorded: the key of the data that a run began with. If it is that of the same files from before files
            without weights were joined, they are blended as then.

    Raises:
        UserError: every fault of the sources, the tokenizer or the cache folder that the user can correct.
    """
    cache = named_folder(data.data_cache_path, flag="--data-cache-path")
    try:
        _make_folder(cache)
        hashes = FileHashes(cache / "hashes")
        with locked(cache / SOURCES_LOCK, progress=progress):
            selection = choose(data)
            parses = data.parse_special_tokens
            tokenizer = (
                load_tokenizer(data.tokenizer, parse_special_tokens=parses) if data.tokenizer else None
            )
            contents = _contents(selection, hashes)
            key = _key(selection, contents, tokenizer, data)
            former = _key(selection.blended(), contents, tokenizer, data)
            if recorded == former != key:
                selection, key = selection.blended(), former
        with locked(cache / f"{key}.lock", progress=progress):
            return _load_or_build(
                cache / key, selection, tokenizer, contents, data=data, hashes=hashes, progress=progress
            )
    except OSError as error:
        raise _refused(cache, error) from error


def _load_or_build(
    folder: Path,
    selection: Selection,
    tokenizer: Tokenizer | None,
    contents: list[str],
    *,
    data: DataConfig,
    hashes: FileHashes,
    progress: Progress,
) -> PreparedData:
    if folder.exists():
        try:
            return _loaded(folder, selection, hashes, tokenizer)
        except Unusable as fault:
            _log.warning("the token files in %s are unusable (%s); making them again", folder, fault)
            discard(folder)
    with building(folder) as partial:
        build(partial, selection, tokenizer, data=data, progress=progress)
        changed = [
            part.source.name
            for part, old, new in zip(selection.parts, contents, _contents(selection, hashes), strict=True)
            if old != new
        ]
        if changed:
            raise UserError(
                f"{several(changed)} changed while it was read; wait until nothing writes to it, then repeat"
            )
    try:
        return _loaded(folder, selection, hashes, tokenizer)
    except Unusable as fault:
        raise UserError(f"{folder}: is not what was just written ({fault}); check the disk") from fault


def _loaded(folder: Path, selection: Selection, hashes: FileHashes, given: Tokenizer | None) -> PreparedData:
    tokenizer, (train, valid, test), meta = load(folder, selection, hashes)
    # of the tokenizer as given: the one in the folder has the same ids, and may have come by another name
    notes = (*selection.notes, *(given.notes if given else ()), *notes_of(meta, selection))
    return PreparedData(tokenizer, train, valid, test, folder, meta, notes)


def _contents(selection: Selection, hashes: FileHashes) -> list[str]:
    return [part.source.fingerprint(hashes) for part in selection.parts]


def _key(selection: Selection, contents: list[str], tokenizer: Tokenizer | None, data: DataConfig) -> str:
    splits = [part.split for part in selection.parts]
    trained = f"byte-level BPE of {data.vocab_size}" + (", parsed" if data.parse_special_tokens else "")
    described = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.identity if tokenizer else trained,
        "shares": selection.shares,
        "parts": list(zip(splits, contents, strict=True)),
    }
    components = selection.components()
    if any(len(numbers) > 1 for numbers in components):
        described["joined"] = components
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _make_folder(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"data_cache_path = {cache}: it, or a part of it, is a file or a broken link, not a folder; "
            "choose another --data-cache-path"
        ) from error


def _refused(cache: Path, error: OSError) -> UserError:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        remedy = f"this process may have {limit} files open: raise that with ulimit -n"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "make room there or choose another --data-cache-path"
    elif isinstance(error.filename, str | Path) and not _lies_in(Path(error.filename), cache):
        remedy = "its files must be readable: change that or leave it out"
    else:
        remedy = "it must be yours to read and write: change that or choose another --data-cache-path"
    return UserError(f"data cannot be prepared in {cache}: {error}; {remedy}")


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
