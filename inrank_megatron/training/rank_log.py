"""One log file for each rank: when and where it ran, its own times, and the error that ended it."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOGS = "logs"
LOG = logging.getLogger("inrank_megatron.rank")


class _QuietHandler(logging.FileHandler):
    """A file that a full disk ends, without a word: what ends the run over it has its own line."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing."""

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def rank_log(folder: Path, *, rank: int, device: str) -> Iterator[None]:
    """Within it, what goes to ``LOG`` is appended to ``logs/rank_<rank>.log`` of the run folder."""
    place = folder / LOGS
    place.mkdir(exist_ok=True)
    handler = _QuietHandler(place / f"rank_{rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    LOG.info("begins on %s, process %d, %s", socket.gethostname(), os.getpid(), device)
    try:
        yield
    except BaseException:
        LOG.exception("ends with an error")
        raise
    else:
        LOG.info("ends")
    finally:
        LOG.removeHandler(handler)
        handler.close()
