"""How long this rank itself takes for its steps, without what it waits for others in collectives."""

import threading
import time
from functools import cache, wraps

import torch
from torch._C._distributed_c10d import Work


class CollectiveWaits:
    """Counts the seconds that the main thread spends in ``Work.wait``, where Gloo's collectives wait.

    Of two ranks that end a step together the slower one has waited less.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        original, main = Work.wait, threading.get_ident()

        @wraps(original)
        def wait(*args, **kwargs):
            began = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                if threading.get_ident() == main:
                    self.seconds += time.perf_counter() - began

        setattr(Work, "wait", wait)  # noqa: B010 (mypy takes it for a method's definition)


@cache
def _collective_waits() -> CollectiveWaits:
    return CollectiveWaits()


class StepClock:
    """Seconds per step of this rank's own work. No call waits for the device.

    On the CPU: from the beginning of a step to the end of its last backward pass, without the waits in
    between. On other devices: from the beginning to the end of the last forward pass, by events of the
    device's stream, so with what tensor-parallel ranks wait for each other there: a slow one makes its whole
    group slow.
    """

    def __init__(self, device: torch.device):
        self._device, self._steps, self._sum = device, 0, 0.0
        self._open: list[tuple[torch.Event, torch.Event]] = []
        if device.type == "cpu":
            self._waits = _collective_waits()

    def begin(self) -> None:
        """A step begins."""
        if self._device.type == "cpu":
            self._began = time.perf_counter() - self._waits.seconds
        else:
            self._first = self._event()

    def forward_done(self) -> None:
        """The last forward pass of the step has been given to the device."""
        if self._device.type != "cpu":
            self._open.append((self._first, self._event()))

    def backward_done(self) -> None:
        """The last backward pass of the step has been given to the device."""
        if self._device.type == "cpu":
            self._add(time.perf_counter() - self._waits.seconds - self._began)

    def take(self) -> float:
        """Mean seconds per step since the last call, of steps that the device is known to have done."""
        done, self._open = self._open[:-1], self._open[-1:]
        for first, last in done:
            self._add(first.elapsed_time(last) / 1000)
        mean = self._sum / self._steps if self._steps else 0.0
        self._steps, self._sum = 0, 0.0
        return mean

    def _add(self, seconds: float) -> None:
        self._steps, self._sum = self._steps + 1, self._sum + seconds

    def _event(self) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event
