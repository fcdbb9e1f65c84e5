"""Work in a process of its own, which may lose its rights, its descriptors or its view of the disk."""

import ctypes
import multiprocessing
import os
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NOBODY = 65534
NEW_MOUNTS = 0x00020000  # CLONE_NEWNS


def in_child(work: Callable[[], Any]) -> Any:
    """What ``work`` returns, in a fork of this process. A skip skips the test; other exceptions fail it."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        try:
            sender.send((work(), None, None))
        except pytest.skip.Exception as skipped:
            sender.send((None, str(skipped), None))
        except BaseException:
            sender.send((None, None, traceback.format_exc()))
        os._exit(0)

    child = context.Process(target=run)
    child.start()
    sender.close()
    result, reason, failure = receiver.recv()
    child.join(timeout=60)
    if reason is not None:
        pytest.skip(reason)
    assert failure is None, failure
    return result


def mounted(*words: object) -> None:
    """Mount something that this process and its children alone see."""
    if os.geteuid() != 0 or ctypes.CDLL(None).unshare(NEW_MOUNTS) != 0:
        pytest.skip("only root may mount")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", *map(str, words)], check=True)


def as_nobody() -> None:
    """Be another user from here on."""
    if os.geteuid() == 0:
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def readable_by_all(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
