"""What a sink is, and how one that is slow, fails or cannot be reached costs the training nothing."""

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

CAPACITY = 10_000  # records that wait for a slow sink; later ones are lost
END_SECONDS = 30.0  # how long the end of a run waits for what is still under way
FAILURE_SECONDS = 5.0  # and one that has failed, whose other ranks are ending


class Sink(Protocol):
    """One place for scalars. Rank 0 makes it; any method may raise anything."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Values by their TensorBoard tags, such as ``lm loss``, after ``step`` completed steps."""

    def close(self, *, finished: bool) -> None:
        """Nothing follows. ``finished``: the run has all its steps."""


@dataclass(frozen=True)
class RunFacts:
    """What a sink may record of the run.

    Attributes:
        folder: the run folder. settings: flat, by name.
        known_id: of the run in the sink's service, from an earlier session; None in the first.
        keep_id: stores that id in the run folder.
    """

    folder: Path
    settings: Mapping[str, Any]
    known_id: str | None = None
    keep_id: Callable[[str], object] = field(default=lambda _: None)


class BackgroundSink:
    """A sink behind a thread: it is opened, fed and closed there, so that nobody waits for it.

    The first failure is kept for :meth:`fault`. A sink that cannot be opened is given up; one whose records
    fail gets the next ones all the same, as a server may come back.

    Args:
        name: for messages. open_sink: makes the sink; called on the thread.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink]):
        self._name, self._open = name, open_sink
        self._records: queue.Queue[tuple[Mapping[str, float], int] | bool] = queue.Queue(CAPACITY)
        self._fault: str | None = None
        self._reported = False
        self._thread = threading.Thread(target=self._run, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Never waits and never raises."""
        try:
            self._records.put_nowait((values, step))
        except queue.Full:
            self._fail(f"it is more than {CAPACITY} records behind")

    def fault(self) -> str | None:
        """A line about the first failure, once."""
        if self._fault is None or self._reported:
            return None
        self._reported = True
        return f"{self._name}: {self._fault}; training goes on, and the run folder has every record"

    def close(self, *, finished: bool, patience: float = END_SECONDS) -> None:
        """Wait for what is under way, at most ``patience`` seconds."""
        try:
            self._records.put_nowait(finished)
        except queue.Full:
            self._fail("it did not keep up")
            return
        self._thread.join(patience)
        if self._thread.is_alive():
            self._fail(f"its last records were not taken within {patience:.0f} s")

    def _run(self) -> None:
        try:
            sink = self._open()
        except BaseException as error:  # some raise SystemExit where nobody is logged in
            self._fail(f"cannot be opened ({_in_a_line(error)})")
            return
        while True:
            record = self._records.get()
            try:
                if isinstance(record, bool):
                    sink.close(finished=record)
                    return
                sink.scalars(*record)
            except BaseException as error:
                self._fail(f"a record was lost ({_in_a_line(error)})")
                if isinstance(record, bool):
                    return

    def _fail(self, reason: str) -> None:
        self._fault = self._fault or reason


def _in_a_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
