"""The other processes of the job on this machine: the launchers above this rank and the ranks beside it."""

import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:  # this module comes before torch and Megatron-Core, whose import takes seconds
    from inrank_megatron.parallel import Parallel

POLL_SECONDS = 0.5
GRACE_SECONDS = 3.0
LAUNCHERS = {"deepspeed.launcher.launch", "torchrun", "torch.distributed.run"}
DEEPSPEED_COMMANDS = {"deepspeed", "ds", "deepspeed.launcher.runner"}


class Neighbours:
    """Ends this process when the job around it has fallen apart and nobody else would end it.

    The `deepspeed` command does not pass SIGTERM on to the launcher that it started, a killed launcher
    cannot pass on anything, and a collective of NCCL waits for a killed rank until its timeout. A thread
    watches for all three, because the main thread may be inside such a collective.

    Make it first of all, so that no launcher is gone before it is known. A lost launcher ends the process
    until :meth:`hand_over`; after that the training loop asks :attr:`launcher_is_gone`, because it has
    something to save. A lost rank, once :meth:`join` knows the ranks, ends the process ``GRACE_SECONDS``
    later, unless the main thread fails by itself before. :meth:`leave` ends the watch.
    """

    def __init__(self, *, rank: int):
        self._rank = rank
        self._launchers = _launchers()
        self._ranks: dict[int, psutil.Process] = {}
        self._handed_over, self._left = threading.Event(), threading.Event()
        threading.Thread(target=self._watch, name="neighbours", daemon=True).start()

    @property
    def launcher_is_gone(self) -> bool:
        return not all(map(_alive, self._launchers))

    def join(self, parallel: "Parallel") -> None:
        """Learn which ranks run on this machine. Collective."""
        own = psutil.Process()
        for rank, (pid, created) in enumerate(parallel.from_every_rank((own.pid, own.create_time()))):
            # The time tells a rank of this machine from a process of the same id on another one.
            if rank != parallel.rank and psutil.pid_exists(pid):
                process = psutil.Process(pid)
                if process.create_time() == created:
                    self._ranks[rank] = process

    def hand_over(self) -> None:
        """From here on the caller sees to a lost launcher."""
        self._handed_over.set()

    def leave(self, parallel: "Parallel") -> None:
        """From here on ranks may end, each in its own time. Collective."""
        parallel.barrier()
        self._left.set()

    def lost_rank(self, *, patience: float = 0.0) -> int | None:
        """A rank of this machine that has ended, or None if there is none within ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while True:
            lost = next((rank for rank, process in self._ranks.items() if not _alive(process)), None)
            if lost is not None or time.monotonic() >= deadline:
                return lost
            time.sleep(0.05)

    def _watch(self) -> None:
        lost_since = None
        while not self._left.wait(POLL_SECONDS):
            if not self._handed_over.is_set() and self.launcher_is_gone:
                self._end("the launcher has ended before training began; nothing was written")
            lost = self.lost_rank()
            lost_since = None if lost is None else lost_since or time.monotonic()
            if lost_since and time.monotonic() - lost_since > GRACE_SECONDS:
                self._end(lost_message(lost))

    def _end(self, message: str) -> None:
        print(f"rank {self._rank}: error: {message}", file=sys.stderr, flush=True)
        os._exit(1)


def lost_message(rank: int) -> str:
    """What the other ranks say when ``rank`` has ended."""
    return (
        f"rank {rank} has ended and no step is possible without it; its own message, if any, says why: "
        "mend that, then continue with --resume auto"
    )


def _launchers() -> list[psutil.Process]:
    """The launcher above this process and, above DeepSpeed's, the `deepspeed` command.

    Nothing else above counts: a shell that starts a job in the background may end.
    """
    found = []
    for process, names in zip(psutil.Process().parents(), (LAUNCHERS, DEEPSPEED_COMMANDS), strict=False):
        try:
            if names.isdisjoint(Path(word).name for word in process.cmdline()[:4]):
                break
        except psutil.Error:
            break
        found.append(process)
    return found


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
