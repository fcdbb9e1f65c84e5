"""Failures in the middle of a run that the user can do something about, in words."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from inrank_megatron.config.out_of_memory import advice, is_shortage, within_memory
from inrank_megatron.config.schema import Config
from inrank_megatron.config.topology import Topology
from inrank_megatron.distributed.marks import Marks
from inrank_megatron.distributed.platform import device
from inrank_megatron.distributed.watchdog import GRACE_SECONDS, JobWatchdog
from inrank_megatron.errors import UserError
from inrank_megatron.training.saving import Saver

# What the machine refuses, rather than the program.
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}


def explained(
    compute: Callable[[], None], *, config: Config, topology: Topology, watchdog: JobWatchdog
) -> None:
    """``compute()``; a UserError where memory runs out, another rank has ended, or the machine refuses a
    file. The watchdog's ``on_failure`` is told of every failure.
    """
    try:
        _explained(compute, config, topology, watchdog)
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        watchdog.note_failure(f"{kind}{error}")
        raise


def _explained(
    compute: Callable[[], None], config: Config, topology: Topology, watchdog: JobWatchdog
) -> None:
    try:
        within_memory(compute, lambda: advice(config, topology, on_cpu=device().type == "cpu"))
    except RuntimeError:
        # What a collective raises when the rank at its other end has ended says nothing to the user.
        if (lost := watchdog.explain(patience=GRACE_SECONDS)) is None:
            raise
        raise UserError(lost) from None
    except OSError as error:
        if error.errno not in REFUSALS | TOO_MANY_FILES:
            raise
        remedy = "raise the limit with ulimit -n" if error.errno in TOO_MANY_FILES else "correct that"
        where = os.fsdecode(error.filename) if error.filename else config.training.save or "the output"
        raise UserError(f"{where}: {error.strerror}; {remedy}, then continue with --resume auto") from error


@contextmanager
def saves_outlive_failures(saver: Saver, marks: Marks) -> Iterator[None]:
    """What a message says to continue from may still be on its way to the disk."""
    try:
        yield
    except UserError:  # which ends all ranks alike
        with suppress(UserError, RuntimeError):
            saver.wait()
        raise
    except (RuntimeError, MemoryError) as error:
        if is_shortage(error):  # perhaps of this rank alone
            marks.begin("last save", marks.work.step if marks.work else 0)  # new to it: for long no hang
            saver.finish()
        raise
