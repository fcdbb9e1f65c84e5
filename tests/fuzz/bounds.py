"""What reading may cost, whatever it reads: seconds, memory, and errors of one kind."""

import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inrank_megatron.errors import UserError

SECONDS, WAITING = 10, 120
"""Of computing and of waiting, for inputs that are read in a fraction of one: others share the machine."""
RESIDENT, RESERVED = 256 * 2**20, 4 * 2**30
"""Bytes that an input of kilobytes may make resident, and reserve, beyond what the process has."""
STATUS, PEAK_OF_NOW = Path("/proc/self/status"), "5"


class Unending(BaseException):
    """Reading took too long; no reader may catch it."""


def outcome(read: Callable[[], Any]) -> Any:
    """What ``read`` gives, or the UserError that it raises: one line. Other exceptions pass.

    Raises:
        Unending: it took longer than it may.
        AssertionError: it took more memory than it may, or tried to, or its error is not one line.
    """
    with _limits():
        before = _bytes("VmRSS")
        try:
            result = read()
        except UserError as error:
            result = error
        grown = _bytes("VmHWM") - before
    assert grown <= RESIDENT, f"{grown / 2**20:.0f} MiB more, next to {result!r:.300}"
    if isinstance(result, UserError):
        assert str(result) and "\n" not in str(result), repr(str(result))
        assert not _exhausted(result), f"asked for more memory than {RESERVED} bytes: {result!r:.300}"
    return result


def _exhausted(error: BaseException | None) -> bool:
    """Whether the lack of memory is behind an error: without the limit it would have been taken."""
    while error is not None:
        if isinstance(error, MemoryError) or re.search("allocate memory", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _limits() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Unending(f"more than {SECONDS} s of work, or {WAITING} s of waiting")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGPROF)}
    outer = signal.setitimer(signal.ITIMER_REAL, WAITING)  # the timer of the whole test
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    Path("/proc/self/clear_refs").write_text(PEAK_OF_NOW)
    resource.setrlimit(resource.RLIMIT_AS, (_bytes("VmSize") + RESERVED, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, *outer)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _bytes(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", STATUS.read_text())[1])
