"""Keeps two jobs from running in one run folder."""

import errno
import fcntl
from pathlib import Path

from filelock import FileLock, Timeout

from inrank_megatron.errors import UserError

LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class FolderLock:
    """Keeps a second job out of a run folder until this process ends; taken on the one rank that writes.

    Attributes:
        note: messages for the user where files cannot be locked, as on Lustre mounted without ``flock``.
    """

    def __init__(self):
        self._lock: FileLock | None = None
        self.note: str | None = None

    def take(self, path: Path) -> None:
        """Lock the existing folder; nothing happens if this object has locked it before."""
        if not _can_lock(path / LOCK):
            self.note = f"{path}: its file system has no locks; start no second job in it"
            return
        lock = self._lock or FileLock(path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{path}: another job is running in it; wait for its end or choose another --save"
            ) from None
        self._lock = lock


def _can_lock(path: Path) -> bool:
    """Not left to filelock: where it cannot lock, what it leaves instead outlives a job that is killed."""
    with open(path, "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in WITHOUT_LOCKS
        return True
