"""The other processes of the job: the launchers above this rank, and the ranks on this and other machines."""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from inrank_megatron.distributed.guarded import Guard
from inrank_megatron.distributed.marks import Marks
from inrank_megatron.distributed.pauses import Pauses, WakingClock

if TYPE_CHECKING:  # this module comes before torch and Megatron-Core, whose import takes seconds
    from inrank_megatron.distributed.hang import State
    from inrank_megatron.distributed.peers import Peers
    from inrank_megatron.distributed.process_groups import Parallel
    from inrank_megatron.distributed.rendezvous import Meeting

POLL_SECONDS = 0.5
GRACE_SECONDS = 3.0
NEWS_SECONDS = 0.5
# Of the time in which all ranks must have ended: what is left is for telling the others and for ending.
SILENCE, PAUSE, GRACE = 0.5, 0.75, 0.05
LAUNCHERS = {"deepspeed.launcher.launch", "torchrun", "torch.distributed.run"}
DEEPSPEED_COMMANDS = {"deepspeed", "ds", "deepspeed.launcher.runner"}
_SESSION = re.compile(r"sshd(-session)?: \S+@notty")


class JobWatchdog:
    """Ends this process when the job around it has fallen apart and nobody else would end it.

    The `deepspeed` command does not pass SIGTERM on to the launcher that it started, a killed launcher
    cannot pass on anything, what ssh has started outlives its connection, and a collective waits for a lost
    host, a stopped or hanging rank, or with NCCL for a killed one, until its timeout. A thread watches for
    all of these, because the main thread may be inside a collective. A rank that is stopped is ended by its
    guard, and is then lost.

    Make it first of all, so that no launcher is gone before it is known. A lost launcher ends the process
    until :meth:`hand_over`; after that the training loop asks :attr:`launcher_is_gone`, because it has
    something to save. A lost rank, once :meth:`join` knows the ranks, ends the process ``GRACE_SECONDS``
    later, unless the main thread fails by itself before. On GPUs of several hosts NCCL may end the process
    sooner than that, without a reason, and the message comes at once. :meth:`leave` ends the watch.

    Attributes:
        marks: what the main thread does, by its own word.
        on_failure: told of what ends this process, in a thread.
    """

    def __init__(self, *, rank: int):
        self.marks = Marks()
        self.on_failure: Callable[[str], None] = lambda message: None
        self._rank = rank
        self._launchers = _launchers()
        self._ranks: dict[int, psutil.Process | None] = {}
        self._lost: str | None = None
        self._host = ""
        self._speaks_at_once = False
        self._grace = GRACE_SECONDS
        self._peers: Peers | None = None
        self._guard: Guard | None = None
        self._handed_over, self._left = threading.Event(), threading.Event()
        self._failure, self._failed, self._noted = "", threading.Event(), threading.Event()
        self._word = threading.Lock()  # of who says what was lost: the watch or the main thread
        # Both from the start on: a thread that is begun where no memory is left never says that it has begun.
        threading.Thread(target=self._watch, name="job watchdog", daemon=True).start()
        threading.Thread(target=self._note, name="failure", daemon=True).start()

    @property
    def launcher_is_gone(self) -> bool:
        return not all(map(_alive, self._launchers))

    def join(self, meeting: "Meeting", *, hang_timeout: float = 60.0, longest: float = 600.0) -> None:
        """Learn which ranks run on this machine and which on others. Called on all ranks.

        Args:
            hang_timeout: seconds within which all ranks end when one is lost, is stopped or hangs.
            longest: seconds that a rank may pause where it has not done such work before (``Pauses``).
        """
        # Imported here: it imports torch.
        from inrank_megatron.distributed.peers import Peers

        own = meeting.ranks.rank
        if meeting.ranks.world_size == 1:
            return
        self._host, machine = meeting.arrivals[own].host, meeting.arrivals[own].machine
        for rank in meeting.ranks_of(machine):
            if rank != own:
                self._ranks[rank] = _process(meeting.arrivals[rank].pid, meeting.arrivals[rank].created)
        self._speaks_at_once = not meeting.is_on_one_machine and meeting.arrivals[own].gpu is not None
        self._grace = min(GRACE_SECONDS, GRACE * hang_timeout)
        silence = SILENCE * hang_timeout
        clock = WakingClock(time.monotonic, most=silence / 4)
        self._pauses = Pauses(self.marks, least=PAUSE * hang_timeout, longest=longest, clock=clock)
        self._peers = Peers(meeting, silence=silence, state=self._state)
        self._guard = Guard(silence, f"rank {own} on host {self._host}")

    def _state(self) -> "State":
        """What this rank does. Called by one thread, every few seconds."""
        from inrank_megatron.distributed.entered import entered_collectives
        from inrank_megatron.distributed.hang import State

        entered = entered_collectives()
        self._pauses.see(sum(entered.values()))
        return State(self.marks.in_words(), self._pauses.seconds, self._pauses.limit, entered)

    def hand_over(self) -> None:
        """From here on the caller sees to a lost launcher."""
        self._handed_over.set()

    def leave(self, parallel: "Parallel") -> None:
        """From here on ranks may end, each in its own time. Collective."""
        parallel.barrier()
        self._left.set()
        if self._peers:
            self._peers.leave()

    def explain(self, *, patience: float) -> str | None:
        """What to say of a failure of the main thread that a lost rank or host may have caused; None if none
        is found within ``patience`` seconds. The caller ends the process, and the watch does not.
        """
        deadline = time.monotonic() + patience
        while (lost := self.lost()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if lost and not self._word.acquire(blocking=False):
            time.sleep(self._grace + 2 * GRACE_SECONDS)  # the watch has said it, and ends this process
        if lost:
            self._left.set()
        return lost

    def note_failure(self, message: str) -> None:
        """Tell :attr:`on_failure`, and wait only so long: its disk may be gone with the host that is lost."""
        self._failure = message
        self._failed.set()
        self._noted.wait(GRACE_SECONDS)

    def _note(self) -> None:
        self._failed.wait()
        with contextlib.suppress(Exception):  # the failure itself is what counts
            self.on_failure(self._failure)
        self._noted.set()

    def lost(self) -> str | None:
        """What to say of the first rank or host that was lost; None while there is none."""
        self._lost = self._lost or self._look()
        return self._lost

    def _look(self) -> str | None:
        gone = [rank for rank, process in self._ranks.items() if not _alive(process)]
        if gone:
            time.sleep(NEWS_SECONDS)  # rank 0 knows more of it, and reports that
        if self._peers and self._peers.lost:
            return self._peers.lost
        if not gone:
            return None
        from inrank_megatron.distributed.peers import ended

        return ended(f"rank {gone[0]} on host {self._host}")

    def _watch(self) -> None:
        lost_since, said = None, False
        while not self._left.wait(POLL_SECONDS):
            if self._guard:
                self._guard.beat()
            if not self._handed_over.is_set() and self.launcher_is_gone:
                self._say("the launcher has ended before training began; nothing was written")
                os._exit(1)
            lost = self.lost()
            lost_since = None if lost is None else lost_since or time.monotonic()
            if lost is None or lost_since is None:
                continue
            over = time.monotonic() - lost_since > self._grace
            if not said and (over or self._speaks_at_once) and self._word.acquire(blocking=False):
                self._say(lost)
                said = True
            if said and over:  # else the main thread has the word, and ends the process
                self.note_failure(lost)
                os._exit(1)
        if self._guard:
            self._guard.leave()

    def _say(self, message: str) -> None:
        print(f"rank {self._rank}: error: {message}", file=sys.stderr, flush=True)


def _launchers() -> list[psutil.Process]:
    """The launcher above this process, above DeepSpeed's the `deepspeed` command, and the ssh session without
    a terminal in which pdsh or another host has started them.

    Nothing else above counts: a shell that starts a job in the background may end.
    """
    parents = psutil.Process().parents()
    found = []
    for process, names in zip(parents, (LAUNCHERS, DEEPSPEED_COMMANDS), strict=False):
        if names.isdisjoint(Path(word).name for word in _words(process)[:4]):
            break
        found.append(process)
    return found + [process for process in parents if _SESSION.match(" ".join(_words(process)))]


def _words(process: psutil.Process) -> list[str]:
    """The command line; none if the process has ended or hides it."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _process(pid: int, created: float) -> psutil.Process | None:
    """The process of this machine, or None if it has ended: its id may be another's by now."""
    try:
        process = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None
    return process if process.create_time() == created else None


def _alive(process: psutil.Process | None) -> bool:
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
