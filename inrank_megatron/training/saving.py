"""Checkpoints written while training goes on: each rank waits for a copy of its part, not for the disk."""

import math
import os
import socket
import time
from collections.abc import Iterable
from enum import IntEnum
from functools import partial
from pathlib import Path

import torch

from inrank_megatron.checkpoint.index import Examine
from inrank_megatron.checkpoint.retention import prune
from inrank_megatron.checkpoint.slices import Slice
from inrank_megatron.checkpoint.writing import PartWriter
from inrank_megatron.config.schema import Config
from inrank_megatron.distributed.memory import available_memory
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.distributed.side_group import SideGroup
from inrank_megatron.errors import UserError
from inrank_megatron.training.examining import Leaders
from inrank_megatron.training.run_logger import RunLogger
from inrank_megatron.training.save_task import SaveTask

MEMORY_SHARE = 0.5  # of what is available: the rest is for batches and page cache
END_SECONDS = 60.0  # until a thread has noticed that those of other ranks have ended
POLL_SECONDS = 1.0  # ranks that wait meet so often: no collective waits for the disk until its timeout


class SaveStatus(IntEnum):
    """The state of one rank; over all ranks the largest counts."""

    CONTINUE = 0
    STOP = 1  # or writes, while all wait for that
    FAILED = 2


class Saver:
    """Saves a training's state; made and called on all ranks alike. At most one checkpoint is in flight.

    Args:
        root: where checkpoints lie, in the run folder. keep_last: how many stay next to the best; None: all.
        verified: a checkpoint that this process has read and found complete.
        leaders: of each rank, the first one on its host, where each host has a folder of its own.
    """

    def __init__(
        self,
        root: Path,
        *,
        parallel: Parallel,
        device: torch.device,
        run_logger: RunLogger,
        keep_last: int | None,
        verified: Path | None,
        leaders: Leaders | None = None,
    ):
        self._root, self._keep_last = root, keep_last
        self._verified = set() if verified is None else {verified}
        self._parallel, self._device, self._run_logger = parallel, device, run_logger
        self._side, self._leaders = SideGroup(parallel), leaders
        self._task: SaveTask | None = None  # while a checkpoint is in flight
        self._ended = False  # whether it had ended when this rank last reported its status

    def save(self, slices: Iterable[Slice], state: dict, *, snapshot_bytes: int) -> None:
        """Copy ``slices`` and have them written; return before that, unless the copies would not fit.

        Args:
            slices: of this rank; those of all ranks make up every tensor. state: recorded next to them.
            snapshot_bytes: of all slices of this rank.
        """
        began = time.monotonic()
        self.wait()
        fits = fits_in_memory(snapshot_bytes)
        deferred = not self._parallel.largest(int(not fits), self._device)
        host = None if self._leaders is None else socket.gethostname()
        writer = PartWriter(self._root, state["step"], part=self._parallel.rank, deferred=deferred, host=host)
        task = SaveTask(
            writer,
            state,
            self._side,
            parallel=self._parallel,
            leaders=self._leaders,
            clear=None if self._keep_last is None else partial(self._clear_away, self._keep_last),
            began=began,
        )
        if not deferred:
            task.begin()
        for piece in slices:
            writer.add(piece)
        self._task = task
        task.start(waits=not deferred)
        if not deferred:
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint in flight, if there is one, is published.

        Raises:
            UserError: on all ranks, if it could not be.
        """
        while True:
            writing = self._task is not None and not self._task.has_ended(within=POLL_SECONDS)
            status = SaveStatus.STOP if writing else self._outcome()
            worst = self._parallel.largest(status, self._device)
            self._raise_if_failed(worst)
            if worst != SaveStatus.STOP:
                break
        self._record()

    def finish(self) -> None:
        """Until the checkpoint in flight, if there is one, is published; without the other ranks, as before
        an end that they do not expect.
        """
        if self._task is not None:
            self._task.has_ended(within=None)

    def any_rank_stops(self, asked: bool) -> bool:
        """Whether any rank was ``asked`` to stop; it also reports what became of a save. Collective.

        Raises:
            UserError: on all ranks, if a checkpoint could not be written.
        """
        return self.should_stop(self._parallel.largest(self.status(asked), self._device))

    def status(self, asked: bool) -> SaveStatus:
        """What this rank has to report to the others, for :meth:`should_stop`, which comes next."""
        self._ended = self._task is not None and self._task.has_ended()
        return max(self._outcome() if self._ended else SaveStatus.CONTINUE, SaveStatus(asked))

    def should_stop(self, worst: int) -> bool:
        """Whether to stop, now that ``worst`` is the largest status of all ranks.

        Raises:
            UserError: on all ranks, if a checkpoint could not be written.
        """
        self._raise_if_failed(worst)
        if self._ended:
            self._record()
        return worst == SaveStatus.STOP

    def _clear_away(self, keep_last: int, newest: Path, examine: Examine) -> None:
        prune(self._root, keep_last=keep_last, newest=newest, verified=self._verified, examine=examine)

    def _outcome(self) -> SaveStatus:
        failed = self._task is not None and self._task.fault is not None
        return SaveStatus.FAILED if failed else SaveStatus.CONTINUE

    def _raise_if_failed(self, worst: int) -> None:
        if worst != SaveStatus.FAILED:
            return
        task, self._task = self._task, None
        if task is not None:
            task.has_ended(within=END_SECONDS)
        fault = None if task is None else task.fault
        messages = self._parallel.gather_from_all_ranks(None if fault is None else str(fault))
        if fault is not None:
            raise fault
        raise UserError(next(filter(None, messages)))

    def _record(self) -> None:
        """What has been published, in the run's records."""
        task, self._task = self._task, None
        if task is None or task.saved is None:  # rank 0 alone publishes
            return
        saved = task.saved
        path = str(saved.path.relative_to(self._root.parent))
        self._run_logger.event(
            "checkpoint",
            saved.step,
            f"step {saved.step}: saved {path} ({saved.seconds:.1f} s, training waited "
            f"{saved.blocked_seconds:.1f} s)",
            path=path,
            seconds=saved.seconds,
            blocked_seconds=saved.blocked_seconds,
        )
        for note in saved.notes:
            self._run_logger.message(note)


def fits_in_memory(snapshot_bytes: int) -> bool:
    """Whether a copy of a rank's part, and those of the other ranks of this machine, may lie in memory while
    they are written.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return ranks * snapshot_bytes <= MEMORY_SHARE * available_memory()


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
