"""What makes a cache folder trustworthy: content hashes, and JSON that is read completely or not at all."""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

Progress = Callable[[str, int | None], None]
"""Called with what is being done and, where known, the tokens done so far."""

LARGEST_JSON = 2**26  # bytes
ALWAYS_READ = 2**16  # bytes
SETTLED_NS = 2 * 10**9  # the coarsest time stamps in use, those of FAT


def quiet(_stage: str, _tokens: int | None) -> None:
    """The progress callback that shows nothing."""


class FileHashes:
    """SHA-256 of files, remembered in this object and, where it can be written, in ``folder``.

    What is remembered holds as long as size, modification time, change time and inode stay: no user can set
    a change time back. Small files are read each time, and so is a file that changed in the last two seconds,
    in which it may change again without another time stamp. Inside the folder's parent, names are relative,
    so a cache that is mounted elsewhere is not read again.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._root = folder.parent.resolve()
        self._known: dict[Path, dict] = {}
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)

    def sha256(self, path: Path) -> str:
        """The hex digest of the file's content; a large file is read only when it has changed."""
        path = Path(path).resolve()
        if path.stat().st_size <= ALWAYS_READ:
            return file_sha256(path)
        name = str(path.relative_to(self._root) if path.is_relative_to(self._root) else path)
        note = self.folder / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.json"
        before, settled = _stamp(path), _is_settled(path)
        known = self._known.get(path) or _read_note(note)
        if known.get("stamp") == [name, *before] and "sha256" in known:
            return known["sha256"]
        digest = file_sha256(path)
        if settled and _stamp(path) == before:
            self._known[path] = {"stamp": [name, *before], "sha256": digest}
            with suppress(OSError):  # another user's folder, or a read-only one
                write_json(note, self._known[path])
        return digest


def file_sha256(path: Path) -> str:
    """The hex digest of the file's content, read as a stream."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path) -> dict | None:
    """The object in the file; None where there is no plain file of at most 64 MiB with a complete one in
    it.
    """
    try:
        # A device or a pipe would be read without end.
        if not path.is_file() or path.stat().st_size > LARGEST_JSON:
            return None
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: dict) -> None:
    """Write the object so that a reader sees the old file or the new one, never a part."""
    # Processes of several machines may write the same file, and their ids may be the same.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _read_note(path: Path) -> dict:
    with suppress(OSError):  # another user's
        return read_json(path) or {}
    return {}


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _is_settled(path: Path) -> bool:
    return time.time_ns() - path.stat().st_ctime_ns > SETTLED_NS
