"""Connections between the hosts of a job, by which each learns of a process or a host that is lost."""

import json
import secrets
import selectors
import socket
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # this module comes before torch and Megatron-Core, whose import takes seconds
    from inrank_megatron.distributed.rendezvous import Meeting

SILENCE_SECONDS = 30
CONNECT_SECONDS = 20.0
_KEY = "hosts"


class Hosts:
    """Every process holds a connection to rank 0; made on all ranks alike, if they are on several machines.

    Nothing is sent while all is well. The system answers for a process, however busy, stopped or swapped out
    it is: it closes the connection when the process ends, and its keep-alive probes find a host that does not
    answer for ``SILENCE_SECONDS``. Rank 0 reports to the others what it finds; who loses rank 0 sees that
    itself.

    ``lost`` is the first loss, in words; None while there is none.
    """

    def __init__(self, meeting: "Meeting"):
        self.lost: str | None = None
        self._reported = False
        self._meeting = meeting
        if meeting.ranks.rank == 0:
            self._listen()
        else:
            self._connect()

    # ---- rank 0 ----

    def _listen(self) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        listener = socket.create_server(
            ("", 0), family=family, dualstack_ipv6=dual, backlog=self._meeting.ranks.world_size
        )
        self._token = secrets.token_hex(16)
        opened = {"port": listener.getsockname()[1], "token": self._token}
        self._meeting.store.set(_KEY, json.dumps(opened))
        threading.Thread(target=self._serve, args=(listener,), name="hosts", daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is listener:
                        connection, _ = listener.accept()
                        _keep_alive(connection)
                        selector.register(connection, selectors.EVENT_READ, _Peer(connection))
                    elif not self._receive(key.data):
                        selector.unregister(key.fileobj)
                        self._report([k.data for k in selector.get_map().values() if k.data])

    def _receive(self, peer: "_Peer") -> bool:
        """Whether the connection is still open; the loss is noted if it was a rank's."""
        try:
            received = peer.connection.recv(4096)
        except OSError as error:
            self._note(peer.rank, error)
            return False
        if not received:
            self._note(peer.rank, None)
            return False
        if peer.rank is None:
            peer.introduce(received, self._token)
        return True

    def _report(self, peers: list["_Peer"]) -> None:
        if self.lost is None or self._reported:
            return
        self._reported = True
        for peer in peers:
            try:
                peer.connection.send(self.lost.encode())
            except OSError:
                continue  # it is lost too, or has ended over the same loss

    # ---- the other ranks ----

    def _connect(self) -> None:
        meeting, first = self._meeting, self._meeting.arrivals[0]
        opened = json.loads(meeting.store.get(_KEY))
        address = meeting.address_of(0)
        try:
            connection = socket.create_connection((address, opened["port"]), timeout=CONNECT_SECONDS)
            connection.settimeout(None)
            connection.sendall(json.dumps({"rank": meeting.ranks.rank, "token": opened["token"]}).encode())
        except OSError as error:
            print(
                f"rank {meeting.ranks.rank}: note: host {first.host} cannot be reached on port "
                f"{opened['port']} ({error.strerror or error}): a lost host will be noticed after "
                "distributed_timeout_minutes",
                file=sys.stderr,
            )
            return
        _keep_alive(connection)
        threading.Thread(target=self._hear, args=(connection,), name="hosts", daemon=True).start()

    def _hear(self, connection: socket.socket) -> None:
        try:
            news = connection.recv(4096)
        except OSError as error:
            self._note(0, error)
            return
        if news:
            self.lost = news.decode()
        else:
            self._note(0, None)

    # ---- both ----

    def _note(self, rank: int | None, error: OSError | None) -> None:
        if rank is not None and self.lost is None:
            self.lost = self._in_words(rank, error)

    def _in_words(self, rank: int, error: OSError | None) -> str:
        from inrank_megatron.distributed.rendezvous import machine_in_words

        arrival = self._meeting.arrivals[rank]
        if error is None or isinstance(error, ConnectionResetError):
            return ended(f"rank {rank} on host {arrival.host}")
        host = machine_in_words(self._meeting, arrival.machine)
        return (
            f"{host} has not answered for {SILENCE_SECONDS} s: it, or the network to it, is lost; once both "
            "are there again continue with --resume auto"
        )


def ended(rank: str) -> str:
    """What the other ranks say when one has ended."""
    return (
        f"{rank} has ended and no step is possible without it; its own message, if any, says why: fix that, "
        "then continue with --resume auto"
    )


@dataclass
class _Peer:
    """A connection that rank 0 has accepted; ``rank`` is None until it has said whose it is."""

    connection: socket.socket
    rank: int | None = None

    def introduce(self, received: bytes, token: str) -> None:
        try:
            words = json.loads(received)
            if secrets.compare_digest(words["token"], token):
                self.rank = words["rank"]
        except (ValueError, KeyError, TypeError):
            return  # a stranger, as a scanner of ports


def _keep_alive(connection: socket.socket) -> None:
    """Have the system find out within ``SILENCE_SECONDS`` that the other host is gone."""
    each = max(1, SILENCE_SECONDS // 6)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, each),
        (socket.TCP_KEEPINTVL, each),
        (socket.TCP_KEEPCNT, 5),
        (socket.TCP_USER_TIMEOUT, 1000 * SILENCE_SECONDS),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
