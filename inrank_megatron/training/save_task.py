"""One checkpoint on its way to the disk: a thread on every rank, which writes that rank's part."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from inrank_megatron.checkpoint.writing import Part, PartWriter
from inrank_megatron.distributed.side_group import SideGroup
from inrank_megatron.errors import UserError

T = TypeVar("T")


@dataclass
class Saved:
    """A published checkpoint. ``seconds``: of the whole save; the training waited for ``blocked_seconds``."""

    path: Path
    step: int
    seconds: float
    blocked_seconds: float
    notes: list[str] = field(default_factory=list)


class SaveTask:
    """One checkpoint being written by a thread of each rank, which end with ``saved``, on rank 0, or with a
    ``fault``. They meet twice: when the folder is there, and when all parts are.

    Args:
        clear: removes checkpoints that are older than the one given, now that it is published.
        began: ``time.monotonic()`` when the training stopped for it.
    """

    def __init__(
        self,
        writer: PartWriter,
        state: dict,
        side: SideGroup,
        *,
        is_first: bool,
        clear: Callable[[Path], None],
        began: float,
    ):
        self._writer, self._state, self._side, self._is_first = writer, state, side, is_first
        self._clear, self._began = clear, began
        self._blocked: float | None = None
        self.saved: Saved | None = None
        self.fault: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="saving", daemon=True)

    def begin(self) -> None:
        """Rank 0 makes the folder before any other writes into it."""
        if self._is_first:
            self._writer.begin()
        self._side.from_first(None)

    def start(self, *, waits: bool) -> None:
        """Write. ``waits``: the training does so until the end."""
        self._blocked = None if waits else time.monotonic() - self._began
        self._thread.start()

    def has_ended(self, *, within: float | None = 0.0) -> bool:
        self._thread.join(within)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            if self._writer.deferred:
                self.begin()
            written, own = _attempt(self._writer.close)
            parts = self._side.to_first((written, _for_others(own)))
            saved, other = _attempt(lambda: self._publish(parts)) if self._is_first else (None, None)
            failed = self._side.from_first(_for_others(other))
            # The same on all ranks, but for a fault of the program, which has its traceback where it was.
            faults = [x for x in (own, other) if x is not None and not isinstance(x, UserError)]
            self.fault, self.saved = next(iter(faults), failed), saved
        except Exception as fault:  # the main thread raises it
            self.fault = fault

    def _publish(self, parts: list[tuple[Part | None, UserError | None]]) -> Saved:
        try:
            for _, fault in parts:
                if fault is not None:
                    raise fault
            path = self._writer.publish([part for part, _ in parts if part is not None], self._state)
        except UserError:
            self._writer.discard()
            raise
        seconds = time.monotonic() - self._began
        blocked = seconds if self._blocked is None else self._blocked
        saved = Saved(path, self._state["step"], seconds, blocked)
        try:
            self._clear(saved.path)
        except OSError as error:
            saved.notes.append(f"older checkpoints cannot be removed ({error}); the run goes on")
        return saved


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result or the fault: other ranks wait for word of either."""
    try:
        return action(), None
    except Exception as fault:
        return None, fault


def _for_others(fault: Exception | None) -> UserError | None:
    if fault is None or isinstance(fault, UserError):
        return fault
    return UserError(f"a rank has failed to save ({type(fault).__name__}); its own message says why")
