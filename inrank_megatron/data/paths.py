"""From the words of a data path to files: a file, a folder, a pattern, or a ``.bin``/``.idx`` prefix."""

import glob
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from inrank_megatron.config.folders import named_path
from inrank_megatron.data.building import SOURCES_LOCK
from inrank_megatron.data.token_file import pair_file
from inrank_megatron.errors import UserError

PAIR = (".bin", ".idx")
WORDS = ".words.npy"
# What lies in folders of data and is none.
NO_DATA = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|citation|manifest)(\..*)?|_success|_metadata"
    r"|(dataset_infos?|dataset_dict|state)\.json|(md5|sha\d*)sums?(\..*)?|.*\.(md5|sha\d+|crc|lock|partial)|thumbs\.db|desktop\.ini"
    r"|.*\.(png|jpe?g|gif|webp|svg|ico)",  # pictures of a folder of notes or of a page
    re.IGNORECASE,
)
SPLIT_WORD = re.compile(r"[^a-z]*(train|valid|validation|val|dev|test)([^a-z]|$)", re.IGNORECASE)
REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
NAMES = 3


@dataclass(frozen=True)
class Prefix:
    """A ``.bin``/``.idx`` pair, by its name without either suffix."""

    path: Path


@dataclass(frozen=True)
class Found:
    """What a word names, in order. ``notes``: what was left out, for the user."""

    entries: tuple[Path | Prefix, ...]
    notes: tuple[str, ...] = ()


def find(word: str) -> Found:
    """The files of one word.

    What exists by that very name comes first: a pair, a file, then a folder with all that lies below it, in
    the order of the relative paths; only then is ``* ? [ ]`` a pattern (``**``: any folders), whose matches
    are taken as if each were given, in sorted order. A path that does not exist is given as it is.

    Raises:
        UserError: a pattern or folder without data, a pipe or device, a path that is not local.
    """
    local = unquote(urlsplit(word).path) if word.startswith("file://") else word
    path = named_path(local)
    pair = path.with_suffix("") if path.suffix in PAIR else path
    if _is_pair(pair):
        return Found((Prefix(pair),))
    if path.is_dir():
        return _below(path)
    if os.path.lexists(path):
        _check_file(path)
        return Found((path,))
    if REMOTE.match(local):
        raise UserError(
            f"data path {word} is not on this machine; download it or mount it, and give the local path"
        )
    return _matches(local) if glob.has_magic(local) else Found((path,))


def _matches(pattern: str) -> Found:
    names = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    if "**" in pattern:  # matches folders with all their files, and these files again
        names = [name for name in names if not os.path.isdir(name)]
    empty = [name for name in names if os.path.isfile(name) and os.path.getsize(name) == 0]
    names = [name for name in names if name not in set(empty) and not _is_words(Path(name))]
    if not names:
        raise UserError(
            f"data path {pattern} matches no data file{_listed(empty)}; correct it, or name the files"
        )
    found = [find(name) for name in names]
    entries = tuple(dict.fromkeys(entry for one in found for entry in one.entries))
    notes = [note for one in found for note in one.notes]
    return Found(entries, (*_left_out(pattern, empty, "empty"), *notes))


def _below(folder: Path) -> Found:
    for name in ("dataset_dict.json", "state.json"):
        if (folder / name).is_file():
            raise UserError(
                f"data path {folder} is a saved dataset ({name} lies in it); give it as --dataset {folder}"
            )
    entries: list[Path | Prefix] = []
    left_out: list[str] = []
    for file in sorted(_walk(folder, left_out), key=lambda file: file.relative_to(folder).as_posix()):
        _check_file(file)
        if file.suffix in PAIR and _is_pair(file.with_suffix("")):
            if file.suffix == ".bin":
                entries.append(Prefix(file.with_suffix("")))
        elif _is_words(file):
            continue
        elif NO_DATA.fullmatch(file.name) or file.stat().st_size == 0:
            left_out.append(str(file.relative_to(folder)))
        else:
            entries.append(file)
    if not entries:
        raise UserError(
            f"data path {folder} is a folder without data files{_listed(left_out)}; name one that has some"
        )
    notes = _left_out(str(folder), left_out, "not data")
    return Found(tuple(entries), (*notes, *_split_names(folder, entries)))


def _walk(folder: Path, left_out: list[str]) -> Iterator[Path]:
    """All files below the folder but hidden ones. Links are followed, each folder is entered once."""
    entered = set()
    for name, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        status = os.stat(name)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        here = Path(name)
        if SOURCES_LOCK in files:  # token files of this program, perhaps of this very folder
            left_out.append(f"{here.relative_to(folder)}/")
            folders.clear()
            continue
        left_out += [str((here / entry).relative_to(folder)) for entry in files + folders if entry[0] == "."]
        folders[:] = sorted(entry for entry in folders if entry[0] != ".")
        yield from (here / entry for entry in files if entry[0] != ".")


def _left_out(word: str, names: list[str], what: str) -> list[str]:
    if not names:
        return []
    subject = "file is" if len(names) == 1 else "files are"
    return [f"{word}: {len(names)} {subject} {what} and left out{_listed(sorted(names))}"]


def _split_names(folder: Path, entries: list[Path | Prefix]) -> list[str]:
    paths = [entry.path if isinstance(entry, Prefix) else entry for entry in entries]
    parts = {part for path in paths for part in path.relative_to(folder).parts}
    splits = sorted({found[1].lower() for part in parts if (found := SPLIT_WORD.match(part))})
    if len(splits) < 2:
        return []
    return [
        f"{folder}: all its files are taken together, though their names are those of the splits "
        f"{', '.join(splits)}; give each split its own path, or the folder as --dataset, to keep them apart"
    ]


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return f" ({', '.join(names[:NAMES])}{more})" if names else ""


def _is_pair(prefix: Path) -> bool:
    return bool(prefix.name) and all(pair_file(prefix, suffix).is_file() for suffix in PAIR)


def _is_words(path: Path) -> bool:
    """Word counts that belong to a pair."""
    return path.name.endswith(WORDS) and _is_pair(path.with_name(path.name.removesuffix(WORDS)))


def _raise(error: OSError) -> None:
    raise error


def _check_file(path: Path) -> None:
    """Refuse what cannot be read twice, and links that lead nowhere."""
    if not path.exists():
        raise UserError(
            f"data path {path} is a link to {os.readlink(path)}, which is not there; fix or remove the link"
        )
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(
            f"data path {path} is a pipe or device, and data are read more than once; write them to a file "
            "first (.gz files need not be unpacked)"
        )
