"""The guard of this rank (``guard.py``), as the rank has it."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("guard.py")


class Guard:
    """Starts the process that ends this one after ``seconds`` without a :meth:`beat`.

    Args:
        whose: how the message about it begins.
    """

    def __init__(self, seconds: float, whose: str):
        heard, self._beats = os.pipe()
        os.set_blocking(self._beats, False)
        words = [sys.executable, "-I", "-S", str(SCRIPT), str(os.getpid()), f"{seconds:g}", whose]
        self._process = subprocess.Popen(words, stdin=heard, stdout=subprocess.DEVNULL)
        os.close(heard)

    def beat(self) -> None:
        """A sign of life."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # a stopped guard, an ended one
            os.write(self._beats, b".")

    def leave(self) -> None:
        """The guard ends."""
        os.close(self._beats)
        self._process.wait()
