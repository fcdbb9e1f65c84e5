"""What makes a cache folder trustworthy: content hashes, atomic writes, one builder at a time."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from inrank_megatron.disk import sync

Progress = Callable[[str, int | None], None]
"""Called with what is being done and, where known, the tokens done so far."""

PATIENCE_SECONDS = 3
LARGEST_JSON = 2**26  # bytes


def quiet(_stage: str, _tokens: int | None) -> None:
    """The progress callback that shows nothing."""


class FileHashes:
    """SHA-256 of files, remembered in ``folder`` under (path, size, modification time in ns)."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def sha256(self, path: Path) -> str:
        """The hex digest of the file's content; the content is read only when the file has changed."""
        path = Path(path).resolve()
        status = path.stat()
        stamp = [str(path), status.st_size, status.st_mtime_ns]
        note = self.folder / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
        known = read_json(note)
        if known is not None and known.get("stamp") == stamp and "sha256" in known:
            return known["sha256"]
        digest = file_sha256(path)
        write_json(note, {"stamp": stamp, "sha256": digest})
        return digest


def file_sha256(path: Path) -> str:
    """The hex digest of the file's content, read as a stream."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path) -> dict | None:
    """The object in the file; None where there is no plain file of at most 64 MiB with a whole one in it."""
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
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def publish(partial: Path, final: Path) -> None:
    """Flush the folder ``partial`` to disk, then rename it to ``final``, which must not exist."""
    for path in sorted(partial.rglob("*"), reverse=True):
        sync(path)
    sync(partial)
    os.rename(partial, final)
    sync(final.parent)


@contextmanager
def locked(path: Path, *, progress: Progress = quiet) -> Iterator[None]:
    """Hold the lock file; the operating system frees it when its holder dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=PATIENCE_SECONDS)
    except Timeout:
        progress(f"waiting for another process that holds {path}", None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
