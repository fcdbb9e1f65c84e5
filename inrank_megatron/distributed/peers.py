"""Connections between the ranks of a job, by which each learns of a loss or a hang."""

import json
import math
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from inrank_megatron.distributed.hang import State, verdict
from inrank_megatron.distributed.lines import Lines
from inrank_megatron.distributed.pauses import WakingClock
from inrank_megatron.distributed.rendezvous import Meeting, machine_in_words

CONNECT_SECONDS = 20.0
# How often a rank says what it does: rank 0 hears so many states a second, but each rank at least so often in
# the time that a host may be silent.
MOST_PER_SECOND, LEAST_IN_SILENCE = 200, 15
SHORTEST_SECONDS = 0.5
LENIENCE = 1.3  # of that time: the guard of a rank comes first
_KEY = "peers"


class Peers:
    """Every rank holds a connection to rank 0; made on all ranks alike, if there are several.

    The system answers for a process, however busy it is: it closes the connection when the process ends, and
    its probes find a host that does not answer for ``silence`` seconds. Ranks tell rank 0 what they do, and
    rank 0 tells them: so each can say what a loss has interrupted, and rank 0 finds a hang. It reports to the
    others what it finds; who loses rank 0 sees that itself.

    Args:
        silence: in seconds.
        state: gives what this rank does; called by one thread.

    Attributes:
        lost: the first loss, in words; None while there is none.
    """

    def __init__(self, meeting: Meeting, *, silence: float, state: Callable[[], State]):
        self.lost: str | None = None
        self._meeting, self._rank, self._state = meeting, meeting.ranks.rank, state
        self._silence, usual = silence, max(SHORTEST_SECONDS, meeting.ranks.world_size / MOST_PER_SECOND)
        self._interval = min(usual, silence / LEAST_IN_SILENCE)
        self._clock = WakingClock(time.monotonic, most=silence / 4)
        self._told, self._reported = -math.inf, False
        self._left, self._telling = threading.Event(), threading.Lock()
        self._known: list[State | None] = [None] * meeting.ranks.world_size
        self._heard = [0.0] * meeting.ranks.world_size
        self._token = secrets.token_hex(16)
        if self._rank == 0:
            self._start(self._listen())
        elif line := self._connect():
            self._start(None, line)

    def leave(self) -> None:
        """From here on ranks may end: nothing is heard or told any more, and no state is asked for.

        A thread that is inside PyTorch's C++ when the interpreter ends would abort the process.
        """
        self._left.set()
        with self._telling:
            pass

    def _listen(self) -> socket.socket:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        listener = socket.create_server(
            ("", 0), family=family, dualstack_ipv6=dual, backlog=self._meeting.ranks.world_size
        )
        opened = {"port": listener.getsockname()[1], "token": self._token}
        self._meeting.store.set(_KEY, json.dumps(opened))
        return listener

    def _connect(self) -> Lines | None:
        meeting, first = self._meeting, self._meeting.arrivals[0]
        opened = json.loads(meeting.store.get(_KEY))
        try:
            connection = socket.create_connection(
                (meeting.address_of(0), opened["port"]), timeout=CONNECT_SECONDS
            )
        except OSError as error:
            print(
                f"rank {self._rank}: note: host {first.host} cannot be reached on port {opened['port']} "
                f"({error.strerror or error}): a lost host or a hang will be noticed after "
                "distributed_timeout_minutes",
                file=sys.stderr,
            )
            return None
        connection.settimeout(None)
        line = Lines(connection, silence=self._silence, rank=0)
        line.send({"rank": self._rank, "token": opened["token"]})
        return line

    # ---- the thread ----

    def _start(self, listener: socket.socket | None, *lines: Lines) -> None:
        threading.Thread(target=self._run, args=(listener, lines), name="peers", daemon=True).start()

    def _run(self, listener: socket.socket | None, lines: Sequence[Lines]) -> None:
        """Hear and tell, in one thread: a fault of a connection shows at one call only."""
        with selectors.DefaultSelector() as selector:
            if listener:
                selector.register(listener, selectors.EVENT_READ)
            for line in lines:
                selector.register(line, selectors.EVENT_READ, line)
            while not self._left.is_set():
                for key, _ in selector.select(self._interval):
                    if listener and key.data is None:
                        line = Lines(listener.accept()[0], silence=self._silence)
                        selector.register(line, selectors.EVENT_READ, line)
                    elif not self._receive(key.data):
                        selector.unregister(key.fileobj)
                with self._telling:
                    if not self._left.is_set():
                        self._tell([key.data for key in selector.get_map().values() if key.data])

    def _receive(self, line: Lines) -> bool:
        """Whether the connection is still open; the loss is noted if it was a rank's."""
        try:
            messages = line.receive()
        except OSError as error:
            self._note(line.rank, error)
            return False
        if messages is None:
            self._note(line.rank, None)
            return False
        for message in messages:
            self._take(line, message)
        return True

    def _take(self, line: Lines, message: dict) -> None:
        if line.rank is None:
            if secrets.compare_digest(str(message.get("token")).encode(), self._token.encode()):
                line.rank = int(message["rank"])
        elif "lost" in message:
            self.lost = self.lost or message["lost"]
        else:
            self._known[line.rank] = State(**message)
            self._heard[line.rank] = self._clock()

    def _tell(self, lines: Sequence[Lines]) -> None:
        now = self._clock()
        if now - self._told > self._interval:
            self._told = now
            own = self._known[self._rank] = self._state()
            for line in lines:
                if line.rank is not None:
                    line.send(asdict(own))
            self.lost = self.lost or self._silent(now)
            if self._rank == 0:
                self.lost = self.lost or verdict(self._known, self._meeting.arrivals)
        if self.lost and self._rank == 0 and not self._reported:
            self._reported = True
            for line in lines:
                line.send({"lost": self.lost}, urgent=True)

    # ---- losses, in words ----

    def _note(self, rank: int | None, error: OSError | None) -> None:
        if rank is not None and self.lost is None:
            self.lost = self._in_words(rank, error)

    def _in_words(self, rank: int, error: OSError | None) -> str:
        arrival, known = self._meeting.arrivals[rank], self._known[rank]
        last = f" (last seen in {known.doing})" if known else ""
        if error is None or isinstance(error, ConnectionResetError):
            silent = self._clock() - self._heard[rank] if known else 0.0
            # So long only if its guard has ended it.
            return ended(
                f"rank {rank} on host {arrival.host}", last, silent if silent > self._silence / 2 else 0
            )
        host = machine_in_words(self._meeting, arrival.machine)
        return (
            f"{host} has not answered for {self._silence:g} s{last}: it, or the network to it, is lost; once "
            "both are there again continue with --resume auto"
        )

    def _silent(self, now: float) -> str | None:
        """What to say of a rank that says nothing and has not been ended for that: its guard is stopped too,
        as when a container is paused.
        """
        for rank, (known, heard) in enumerate(zip(self._known, self._heard, strict=True)):
            if rank != self._rank and known and now - heard > LENIENCE * self._silence:
                return (
                    f"rank {rank} on host {self._meeting.arrivals[rank].host} has given no sign of life for "
                    f"{now - heard:.0f} s (last seen in {known.doing}): it is held up, or the network to "
                    "it is lost or too slow; see to that, then continue with --resume auto"
                )
        return None


def ended(rank: str, last: str = "", silent: float = 0) -> str:
    """What the other ranks say when one has ended, after ``silent`` seconds in which it did nothing."""
    if silent:
        return (
            f"{rank} was stopped, or held up, for {silent:.0f} s and has ended{last}; see to that, then "
            "continue with --resume auto"
        )
    return (
        f"{rank} has ended{last} and no step is possible without it; its own message, if any, says why: fix "
        "that, then continue with --resume auto"
    )
