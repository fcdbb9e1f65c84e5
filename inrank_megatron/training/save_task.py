"""One checkpoint on its way to the disk: a thread on every rank, which writes that rank's part."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from inrank_megatron.checkpoint.folder import published
from inrank_megatron.checkpoint.index import Examine
from inrank_megatron.checkpoint.retention import keep_only
from inrank_megatron.checkpoint.writing import Part, PartWriter, documents
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.distributed.side_group import SideGroup
from inrank_megatron.errors import UserError
from inrank_megatron.training.examining import JobExaminer, Leaders

T = TypeVar("T")
Clear = Callable[[Path, Examine], None]
Written = tuple[Part | None, UserError | None]
"""What a rank has written, or why not."""
Faults = tuple[UserError | None, Exception | None]
"""The fault that all ranks are told of, and this rank's own."""


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
    ``fault``. They meet when the folder is there, when all parts are, and when it is published.

    Where hosts do not share the folder, the first rank of each publishes its host's part, rank 0 after all
    others: without its folder there is no checkpoint.

    Args:
        leaders: None where all ranks see one folder.
        clear: removes checkpoints that are older than the one given, now that it is published; None: all
            stay.
        began: ``time.monotonic()`` when the training stopped for it.
    """

    def __init__(
        self,
        writer: PartWriter,
        state: dict,
        side: SideGroup,
        *,
        parallel: Parallel,
        leaders: Leaders | None,
        clear: Clear | None,
        began: float,
    ):
        self._writer, self._state, self._side = writer, state, side
        self._is_first, self._is_local = parallel.rank == 0, leaders is not None
        self._leads = self._is_first if leaders is None else leaders[parallel.rank] == parallel.rank
        self._examiner = JobExaminer(parallel, side, leaders)
        self._clear, self._began = clear, began
        self._blocked: float | None = None
        self.saved: Saved | None = None
        self.fault: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="saving", daemon=True)

    def begin(self) -> None:
        """Rank 0, or one of each host, makes the folder before any other writes into it."""
        if self._leads:
            self._writer.begin()
        self._side.to_first(None)
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
            failed, other = self._publish(parts)
            if failed is None and self._clear is not None:
                failed, other = self._remove_older(self._clear)
            if failed is not None and self._leads:
                self._writer.discard()
            # The same on all ranks, but for a fault of the program, which has its traceback where it was.
            faults = [x for x in (own, other) if x is not None and not isinstance(x, UserError)]
            self.fault = next(iter(faults), failed)
            self.saved = self.saved if self.fault is None else None
        except Exception as fault:  # the main thread raises it
            self.fault = fault

    def _publish(self, parts: list[Written]) -> Faults:
        made, own = _attempt(lambda: self._documents(parts)) if self._is_first else (None, None)
        if self._is_local:
            sent = self._side.from_first(made)
            if self._leads and not self._is_first and sent is not None:
                _, own = _attempt(lambda: self._writer.publish_documents(sent))
            others = self._side.to_first(_for_others(own))
            own = next(filter(None, [own, *others]), None)
        if made is not None and own is None:
            self.saved, own = _attempt(lambda: self._published(made))
        return self._side.from_first(_for_others(own)), own

    def _documents(self, parts: list[Written]) -> dict[str, bytes]:
        for _, fault in parts:
            if fault is not None:
                raise fault
        return documents([part for part, _ in parts if part is not None], self._state)

    def _published(self, made: Mapping[str, bytes]) -> Saved:
        path = self._writer.publish_documents(made)
        seconds = time.monotonic() - self._began
        return Saved(path, self._state["step"], seconds, seconds if self._blocked is None else self._blocked)

    def _remove_older(self, clear: Clear) -> Faults:
        """All ranks read back what is kept; then rank 0 removes what is not, and other hosts follow it."""
        own, root = None, self._writer.final.parent
        if self.saved is not None:
            saved = self.saved
            _, own = _attempt(lambda: self._examiner.lead(lambda: clear(saved.path, self._examiner)))
            own = self._note(own)
        else:
            self._examiner.serve()
        failed = self._side.from_first(_for_others(own))
        if failed is None and self._is_local:
            kept = self._side.from_first([folder.name for folder in published(root)])
            follows = self._leads and not self._is_first
            refused = _attempt(lambda: keep_only(root, kept))[1] if follows else None
            for fault in self._side.to_first(refused):
                self._note(fault)
        return failed, own

    def _note(self, fault: Exception | None) -> Exception | None:
        """The fault, unless it only is that something cannot be removed."""
        if not isinstance(fault, OSError) or self.saved is None:
            return fault
        self.saved.notes.append(f"older checkpoints cannot be removed ({fault}); the run continues")
        return None


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
