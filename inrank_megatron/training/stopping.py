"""When a run must stop early: a signal, a time limit, or a launcher that is gone."""

import signal
import socket
import time
from types import FrameType
from typing import TYPE_CHECKING

from inrank_megatron.distributed.watchdog import JobWatchdog

if TYPE_CHECKING:  # this module comes before torch and Megatron-Core, whose import takes seconds
    from inrank_megatron.distributed.process_groups import Parallel

# Batch systems warn of a time limit with one of these, which end a process unless it listens.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *WARNINGS)


def interrupt_by_warnings() -> None:
    """Until :meth:`StopRequest.listen` a warning interrupts, as Ctrl-C does: there is nothing to save yet."""
    for number in WARNINGS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


class StopRequest:
    """Notices, on this rank, that the run should save and end. The loop asks at each step; all ranks agree.

    Args:
        limit_minutes: how long the program may run, from the making of this object; None: no limit.
    """

    def __init__(self, watchdog: JobWatchdog, *, limit_minutes: float | None = None):
        self._watchdog = watchdog
        self._deadline = None if limit_minutes is None else time.monotonic() + 60 * limit_minutes
        self._signal: int | None = None
        self._interrupts = 0

    def listen(self) -> None:
        """From here on a signal asks for a stop instead of ending the process; a second SIGINT ends it."""
        self._watchdog.hand_over()
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` sets it
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt

    @property
    def is_urgent(self) -> bool:
        """Whether whoever asked will soon end the process by force, as launchers do."""
        return self._signal is not None

    def reason(self) -> str | None:
        """Why to stop, or None to go on."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "exit_duration_in_mins has passed"
        if self._watchdog.launcher_is_gone:
            return "the launcher has ended"
        return None

    def reason_of_all(self, parallel: "Parallel") -> str:
        """Why to stop, and which ranks that has reached, unless it has all. Collective."""
        from inrank_megatron.distributed.roll import several  # here: it imports torch

        told = parallel.gather_from_all_ranks((self.reason(), socket.gethostname()))
        asked = [(rank, host) for rank, (reason, host) in enumerate(told) if reason is not None]
        reason = next((reason for reason, _ in told if reason is not None), "a rank was asked to stop")
        if len(asked) == len(told) or not asked:
            return reason
        hosts = several("host", sorted({host for _, host in asked}))
        return f"{reason} ({several('rank', [rank for rank, _ in asked])} on {hosts})"
