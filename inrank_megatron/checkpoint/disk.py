"""What outlives a power cut."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Put the file's content, or the folder's list of names, on the disk. OSError: the disk refuses it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
