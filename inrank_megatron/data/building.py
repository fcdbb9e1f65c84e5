"""One builder at a time, where the file system can lock; several that do no harm, where it cannot."""

import errno
import fcntl
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from inrank_megatron.checkpoint.disk import sync
from inrank_megatron.data.cache import Progress

PATIENCE_SECONDS = 3
POLL_SECONDS = 0.05
ABANDONED_SECONDS = 24 * 3600
PARTIAL = ".partial"
SOURCES_LOCK = "sources.lock"
"""Lies in every cache folder, and distinguishes it from data."""
TAKEN = (errno.EEXIST, errno.ENOTEMPTY)


@contextmanager
def locked(path: Path, *, progress: Progress) -> Iterator[None]:
    """Hold the lock file; the operating system frees it when its holder dies.

    Where there can be no lock (a read-only mount, another user's file, a file system without locks) the body
    runs without one: it saves work, and nothing that `building` makes depends on it.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            descriptor = stack.enter_context(_opened_lock(path))
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not (held := _lock(descriptor)) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            if not held:
                progress(f"waiting for another process that holds {path}", None)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextmanager
def building(final: Path) -> Iterator[Path]:
    """A new folder to fill, flushed to disk and renamed to ``final`` if the body succeeds, else removed.

    Its name is unique on all machines. If another process publishes first, that one's folder stays. What
    builders left here that were killed goes.
    """
    _remove_abandoned(final)
    partial = _unique(final)
    partial.mkdir(parents=True)
    try:
        with _opened_folder(partial) as descriptor:
            with suppress(OSError):
                _lock(descriptor)  # so that other builders see that this one lives
            yield partial
            for path in sorted(partial.rglob("*"), reverse=True):
                sync(path)
            sync(partial)
            try:
                os.rename(partial, final)
            except OSError as error:
                if error.errno not in TAKEN:
                    raise
        sync(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def discard(folder: Path) -> None:
    """Rename the folder and then remove it, so that no process finds half of it."""
    aside = _unique(folder)
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_abandoned(final: Path) -> None:
    for folder in final.parent.glob(f"{final.name}.*{PARTIAL}"):
        with suppress(OSError):
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """A lock shows whether a builder on this machine lives; of another machine's, only time does."""
    age = time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    if age > ABANDONED_SECONDS:
        return True
    with _opened_folder(folder) as descriptor:
        return folder.name.split(".")[1] == _machine() and _lock(descriptor)


def _unique(final: Path) -> Path:
    return final.with_name(f"{final.name}.{_machine()}.{secrets.token_hex(8)}{PARTIAL}")


def _machine() -> str:
    """Of a running kernel: containers on it see each other's locks, whatever their host names."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node().replace(".", "-") or "unknown"


@contextmanager
def _opened_lock(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:  # another user's file can be locked all the same
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _opened_folder(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether it is locked now; False where another process holds it. OSError: there are no locks here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
