"""Checkpoints written beside the training: it waits for a copy of its state, not for the disk."""

import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

from inrank_megatron.checkpoint.folder import CheckpointWriter
from inrank_megatron.checkpoint.retention import prune
from inrank_megatron.config.schema import Config
from inrank_megatron.distributed.memory import available_memory
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.training.run_logger import Journal

MEMORY_SHARE = 0.5  # of what is available: the rest is for batches, page cache and the gathering of tensors
POLL_SECONDS = 1.0  # ranks that wait meet so often: no collective waits for the disk until its timeout


class Standing(IntEnum):
    """How a rank stands; over all ranks the largest counts."""

    GOES_ON = 0
    STOPS = 1  # or writes, while all wait for that
    FAILED = 2


class Saver:
    """Saves a training's state; made and called on all ranks alike. At most one checkpoint is in flight.

    Args:
        root: where checkpoints lie, in the run folder. keep_last: how many stay beside the best; None: all.
        verified: a checkpoint that this process has read and found whole.
    """

    def __init__(
        self,
        root: Path,
        *,
        parallel: Parallel,
        device: torch.device,
        journal: Journal,
        keep_last: int | None,
        verified: Path | None,
    ):
        self._root, self._keep_last = root, keep_last
        self._verified = set() if verified is None else {verified}
        self._parallel, self._device, self._journal = parallel, device, journal
        self._task: _Task | None = None  # on rank 0, while a checkpoint is in flight
        self._ended = False  # whether it had ended when this rank last said how it stands

    def save(self, tensors: Iterable[tuple[str, Tensor]], state: dict, *, snapshot_bytes: int) -> None:
        """Copy ``tensors`` and have them written; return before that, unless the copies would not fit.

        Args:
            tensors: whole ones, which all ranks gather. state: what is recorded beside them.
            snapshot_bytes: of all tensors together.
        """
        began = time.monotonic()
        self.wait()
        deferred = self._parallel.from_first_rank(lambda: fits_in_memory(snapshot_bytes))
        first = self._parallel.rank == 0
        writer = CheckpointWriter(self._root, state["step"], deferred=deferred) if first else None
        for name, tensor in tensors:
            if writer:
                writer.add(name, tensor)
            del tensor  # before the next is gathered
        if writer:
            self._task = _Task(writer, state, clear=self._clear_away, began=began, waits=not deferred)
        if not deferred:
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint in flight, if there is one, is published.

        Raises:
            UserError: on all ranks, if it could not be.
        """
        while True:
            writing = self._task is not None and not self._task.has_ended(within=POLL_SECONDS)
            own = Standing.STOPS if writing else self._outcome()
            worst = self._parallel.largest(own, self._device)
            self._raise_if_failed(worst)
            if worst != Standing.STOPS:
                break
        self._record()

    def finish(self) -> None:
        """Until the checkpoint in flight, if there is one, is published; without the other ranks, as before
        an end that they do not expect.
        """
        if self._task is not None:
            self._task.has_ended(within=None)

    def stops(self, asked: bool) -> bool:
        """Whether any rank was ``asked`` to stop; it also tells what became of a save. Collective.

        Raises:
            UserError: on all ranks, if a checkpoint could not be written.
        """
        return self.heeds(self._parallel.largest(self.standing(asked), self._device))

    def standing(self, asked: bool) -> Standing:
        """What this rank has to tell the others, for :meth:`heeds`, which comes next."""
        self._ended = self._task is not None and self._task.has_ended()
        return max(self._outcome() if self._ended else Standing.GOES_ON, Standing(asked))

    def heeds(self, worst: int) -> bool:
        """Whether to stop, now that ``worst`` is the largest standing of all ranks.

        Raises:
            UserError: on all ranks, if a checkpoint could not be written.
        """
        self._raise_if_failed(worst)
        if self._ended:
            self._record()
        return worst == Standing.STOPS

    def _clear_away(self, newest: Path) -> None:
        if self._keep_last is not None:
            prune(self._root, keep_last=self._keep_last, newest=newest, verified=self._verified)

    def _outcome(self) -> Standing:
        failed = self._task is not None and self._task.fault is not None
        return Standing.FAILED if failed else Standing.GOES_ON

    def _raise_if_failed(self, worst: int) -> None:
        if worst == Standing.FAILED:
            self._parallel.from_first_rank(self._fail)

    def _fail(self) -> None:
        fault, self._task = self._task.fault, None
        raise fault

    def _record(self) -> None:
        """What has been published, in the run's records."""
        task, self._task = self._task, None
        if task is None:
            return
        saved = task.saved
        path = str(saved.path.relative_to(self._root.parent))
        self._journal.event(
            "checkpoint",
            saved.step,
            f"step {saved.step}: saved {path} ({saved.seconds:.1f} s, training waited "
            f"{saved.blocked_seconds:.1f} s)",
            path=path,
            seconds=saved.seconds,
            blocked_seconds=saved.blocked_seconds,
        )
        for note in saved.notes:
            self._journal.message(note)


def fits_in_memory(snapshot_bytes: int) -> bool:
    """Whether a copy of the whole state may lie in memory while it is written."""
    return snapshot_bytes <= MEMORY_SHARE * available_memory()


def without_best(config: Config) -> str | None:
    """What to say of ``keep_last`` where the last checkpoint alone will have a validation loss."""
    t = config.training
    if None in (t.keep_last, t.save_interval, t.eval_interval) or t.save_interval >= t.train_iters:
        return None
    both = math.lcm(t.save_interval, t.eval_interval)
    if both < t.train_iters:
        return None
    return (
        f"keep_last = {t.keep_last}: the best checkpoint cannot be kept, as none before the last gets a "
        f"validation loss: save_interval = {t.save_interval} and eval_interval = {t.eval_interval} coincide "
        f"at step {both} first, of {t.train_iters}; make --save-interval a multiple of --eval-interval"
    )


@dataclass
class _Saved:
    """A published checkpoint. ``seconds``: of the whole save; the training waited for ``blocked_seconds``."""

    path: Path
    step: int
    seconds: float
    blocked_seconds: float
    notes: list[str] = field(default_factory=list)


class _Task:
    """One checkpoint being written by a thread, which ends with ``saved`` or with a ``fault``.

    Args:
        clear: removes checkpoints that are older than the one given, now that it is published.
        began: ``time.monotonic()`` when the training stopped for it.
        waits: the training waits for the end.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        state: dict,
        *,
        clear: Callable[[Path], None],
        began: float,
        waits: bool,
    ):
        self._writer, self._state, self._clear = writer, state, clear
        self._began, self._blocked = began, None if waits else time.monotonic() - began
        self.saved: _Saved | None = None
        self.fault: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="saving", daemon=True)
        self._thread.start()

    def has_ended(self, *, within: float | None = 0.0) -> bool:
        self._thread.join(within)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            path = self._writer.publish(self._state)
            seconds = time.monotonic() - self._began
            blocked = seconds if self._blocked is None else self._blocked
            saved = _Saved(path, self._state["step"], seconds, blocked)
            self._clear_away(saved)
            self.saved = saved
        except Exception as fault:  # the main thread raises it, on every rank
            self.fault = fault

    def _clear_away(self, saved: _Saved) -> None:
        try:
            self._clear(saved.path)
        except OSError as error:
            saved.notes.append(f"older checkpoints cannot be removed ({error}); the run goes on")
