"""Every host reaches every other on ports that nobody has named, and their clocks agree.

Gloo and NCCL listen on any free port; where a firewall blocks those, a process group waits until its timeout.
"""

import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from inrank_megatron.distributed.roll import several
from inrank_megatron.preflight.findings import ERROR, WARNING, Finding, HostFacts
from inrank_megatron.preflight.place import Place

CONNECTIONS, CLOCK = "connections", "clock"
CONNECT_SECONDS = 3.0
CLOCK_SECONDS = 1.0
PINGS = 4
_TIME = struct.Struct("!d")


class Connections:
    """A host listens, all others connect and ask for the time."""

    on_one_host = False

    def gather(self, place: Place) -> dict[str, Any]:
        if len(place.hosts) == 1:
            return {}
        with _Server() as server:
            ports = place.exchange("a port to connect to", server.server_address[1])
            others = [number for number in range(len(ports)) if number != place.number]

            def ask(number: int) -> float | str:
                address = place.meeting.address_of(place.first_ranks[number])
                return _offset(address, ports[number])

            with ThreadPoolExecutor(32) as pool:
                answers = dict(zip(others, pool.map(ask, others), strict=True))
            place.exchange("connections", None)  # until then somebody may still connect
        unreachable = {str(number): answer for number, answer in answers.items() if isinstance(answer, str)}
        first = answers.get(0, 0.0)
        return {CONNECTIONS: unreachable, CLOCK: None if isinstance(first, str) else -first}

    def judge(self, hosts: Sequence[HostFacts]) -> Iterator[Finding]:
        if len(hosts) > 1:
            yield from _unreachable(hosts)
            yield from _astray(hosts)

    def shown(self, row: str, value: Any) -> str:
        if row == CLOCK:
            return "unknown" if value is None else f"{round(value, 3) + 0.0:+.3f} s"
        return f"not to {len(value)} hosts" if value else "to all hosts"


class _Server(socketserver.ThreadingTCPServer):
    """Tells the time on any port of every address."""

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    request_queue_size = 1024
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("", 0), _TellTime)
        threading.Thread(target=self.serve_forever, args=(0.05,), name="preflight", daemon=True).start()

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()


class _TellTime(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.settimeout(CONNECT_SECONDS)
        with suppress(OSError):  # a scanner of ports, or a host that is lost meanwhile
            while self.request.recv(1):
                self.request.sendall(_TIME.pack(time.time()))


def _offset(address: str, port: int) -> float | str:
    """Seconds by which the other host's clock is ahead, by the quickest answer; without one the reason."""
    answers = []
    try:
        with socket.create_connection((address, port), timeout=CONNECT_SECONDS) as connection:
            for _ in range(PINGS):
                asked = time.time()
                connection.sendall(b"?")
                [theirs] = _TIME.unpack(connection.recv(_TIME.size, socket.MSG_WAITALL))
                answered = time.time()
                answers.append((answered - asked, theirs - (asked + answered) / 2))
    except (OSError, struct.error) as error:
        return f"{getattr(error, 'strerror', None) or error}"
    return min(answers)[1]


def _unreachable(hosts: Sequence[HostFacts]) -> Iterator[Finding]:
    """One finding for each host that others do not reach."""
    for number, host in enumerate(hosts):
        reasons = {
            h.host: h.facts[CONNECTIONS][str(number)] for h in hosts if str(number) in h.facts[CONNECTIONS]
        }
        if reasons:
            yield Finding(
                ERROR,
                CONNECTIONS,
                host.host,
                f"not reached from {several('host', list(reasons))} ({next(iter(reasons.values()))})",
                "the processes of a job connect on any free port",
                "open all TCP ports between the hosts, or name an open network with MASTER_ADDR, "
                "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
            )


def _astray(hosts: Sequence[HostFacts]) -> Iterator[Finding]:
    """A finding for each clock that is not where most are."""
    clocks = {host.host: host.facts[CLOCK] for host in hosts if host.facts[CLOCK] is not None}
    if not clocks:
        return
    usual = max(
        clocks.values(), key=lambda at: sum(abs(at - other) <= CLOCK_SECONDS for other in clocks.values())
    )
    for name, at in clocks.items():
        if abs(at - usual) > CLOCK_SECONDS:
            yield Finding(
                WARNING,
                CLOCK,
                name,
                f"{at - usual:+.1f} s against the other hosts",
                f"more than {CLOCK_SECONDS:g} s, so times of logs and files cannot be compared",
                "synchronise it (chrony, or timedatectl set-ntp true)",
            )
