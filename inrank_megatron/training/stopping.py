"""When a run must stop early: a signal, a time limit, or a launcher that is gone."""

import signal
import time
from types import FrameType

import psutil

LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run")


class StopRequest:
    """Notices, on this rank, that the run should save and end. The loop asks at every step and all ranks agree.

    SIGTERM and SIGINT set it; a second SIGINT interrupts at once. The `deepspeed` command does not pass SIGTERM on
    to the launcher that it started, and a killed launcher cannot pass on anything: both leave ranks behind that
    nobody would ever stop. So each rank also watches the launchers above it.
    """

    def __init__(self, *, limit_minutes: float | None = None):
        self._deadline = None if limit_minutes is None else time.monotonic() + 60 * limit_minutes
        self._signal: int | None = None
        self._launchers = _launchers()
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def reason(self) -> str | None:
        """Why to stop, or None to go on."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "exit_duration_in_mins has passed"
        if any(not _alive(process) for process in self._launchers):
            return "the launcher has ended"
        return None


def _launchers() -> list[psutil.Process]:
    """The launcher processes directly above this one, at most two: DeepSpeed's, and the `deepspeed` command."""
    found = []
    for process in psutil.Process().parents()[:2]:
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            break
        if not any(name in command for name in LAUNCHERS):
            break
        found.append(process)
    return found


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
