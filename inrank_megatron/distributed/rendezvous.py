"""Where the processes of a job meet first: a store, and a roll of who they are, before any process group.

What would make a process group hang or fail without a reason is found here and said on every rank: ranks that
do not come, that come twice, that count or are set up otherwise, or that share a GPU.
"""

import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

import psutil
import torch.distributed as dist

from inrank_megatron.distributed.launcher import Ranks, adopt_ranks
from inrank_megatron.distributed.platform import device_identity
from inrank_megatron.errors import UserError

POLL_SECONDS = 0.1
REMINDER_SECONDS = 60.0
LOOPBACK = "lo"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Arrival:
    """What a process says of itself.

    Attributes:
        machine: tells apart machines, and containers on one that do not see each other's processes.
        pid, created: which process of the machine; created is in seconds since the epoch.
        address: of its machine, as it sets out for the meeting point.
        gpu: identity of its GPU; None on a CPU.
        settings: digest of what must be alike on all ranks.
    """

    host: str
    machine: str
    pid: int
    created: float
    world_size: int
    address: str
    gpu: str | None
    settings: str


@dataclass(frozen=True)
class Meeting:
    """``arrivals``: of all ranks, in their order."""

    ranks: Ranks
    store: dist.Store
    arrivals: list[Arrival]

    @property
    def is_on_one_machine(self) -> bool:
        return len({arrival.machine for arrival in self.arrivals}) == 1

    def ranks_of(self, machine: str) -> list[int]:
        return [rank for rank, arrival in enumerate(self.arrivals) if arrival.machine == machine]

    def wait_for_all(self, what: str) -> None:
        """Wait until all ranks have ``what``, however long that takes them; a collective has a time limit.

        Called on every rank, once for each ``what``.
        """
        keys = {rank: f"{what}/{rank}" for rank in range(self.ranks.world_size)}
        self.store.set(keys[self.ranks.rank], "")
        began = reminded = time.monotonic()
        while not self.store.check(list(keys.values())):
            time.sleep(POLL_SECONDS)
            if time.monotonic() - reminded > REMINDER_SECONDS:
                reminded = time.monotonic()
                missing = [rank for rank, key in keys.items() if not self.store.check([key])]
                if missing and self.ranks.rank == min(keys.keys() - set(missing)):  # one of them says so
                    print(
                        f"{_several('rank', missing)} of {len(keys)} without {what} after "
                        f"{reminded - began:.0f} s; the others wait",
                        file=sys.stderr,
                        flush=True,
                    )


def meet(*, timeout_minutes: float, settings: Mapping[str, object]) -> Meeting:
    """Wait until all processes of the job are here. Called on every rank, before any process group is made.

    Args:
        settings: what must be alike on all ranks, as JSON has it.

    Raises:
        UserError: there is no meeting point, not all come in time, or they do not belong together.
    """
    ranks = adopt_ranks()
    if ranks.world_size == 1:
        return Meeting(ranks, dist.HashStore(), [_own(ranks, settings)])
    deadline = time.monotonic() + 60 * timeout_minutes
    store = _store(ranks, deadline)
    roll = Roll(ranks, store)
    try:
        roll.enter(_own(ranks, settings), settings)
        return Meeting(ranks, store, roll.call(settings, deadline))
    except dist.DistError as error:
        raise _no_meeting(ranks, error) from error


class Roll:
    """The roll in the store, as one rank keeps it."""

    def __init__(self, ranks: Ranks, store: dist.Store):
        self._ranks, self._store = ranks, store
        self._arrivals: dict[int, Arrival] = {}

    def enter(self, own: Arrival, settings: Mapping[str, object]) -> None:
        rank = self._ranks.rank
        if self._store.add(f"entered/{rank}", 1) > 1:
            raise UserError(
                f"RANK = {rank}: another process of this job has that rank already, or another job meets at "
                f"{_place(self._ranks)}; give every process its own RANK, and every job its own MASTER_PORT"
            )
        if rank == 0:
            self._store.set("settings", json.dumps(settings))
        self._store.set(f"arrival/{rank}", json.dumps(asdict(own)))

    def call(self, settings: Mapping[str, object], deadline: float) -> list[Arrival]:
        """All arrivals; each is compared as it comes, so that nobody waits for who is not expected there."""
        began = reminded = time.monotonic()
        while missing := [r for r in range(self._ranks.world_size) if r not in self._arrivals]:
            # `wait` of the store writes a warning each time that it ends without what it waits for.
            come = [rank for rank in missing if self._store.check([f"arrival/{rank}"])]
            self._read(come, settings)
            if not come:
                time.sleep(POLL_SECONDS)
            if time.monotonic() - reminded > REMINDER_SECONDS:
                reminded = time.monotonic()
                if self._ranks.rank == min(self._arrivals, default=self._ranks.rank):  # one of them says so
                    print(self._absent(reminded - began), file=sys.stderr, flush=True)
            if time.monotonic() > deadline:
                break
        if len(self._arrivals) < self._ranks.world_size:
            raise UserError(
                f"{self._absent(time.monotonic() - began)}; start the missing ones with the same command, "
                "and see that their hosts reach this one"
            )
        self._check_gpus()
        return [self._arrivals[rank] for rank in range(self._ranks.world_size)]

    def _read(self, ranks: list[int], settings: Mapping[str, object]) -> None:
        if not ranks:
            return
        for rank, text in zip(ranks, self._store.multi_get([f"arrival/{r}" for r in ranks]), strict=True):
            arrival = self._arrivals[rank] = Arrival(**json.loads(text))
            if arrival.world_size != self._ranks.world_size:
                raise UserError(
                    f"WORLD_SIZE = {self._ranks.world_size} on rank {self._ranks.rank}, and "
                    f"{arrival.world_size} on rank {rank} on host {arrival.host}; start all with the same "
                    "number of processes"
                )
        first = self._arrivals.get(0)
        if first and any(arrival.settings != first.settings for arrival in self._arrivals.values()):
            raise UserError(self._difference(settings))

    def _difference(self, settings: Mapping[str, object]) -> str:
        first = self._arrivals[0]
        theirs = json.loads(self._store.get("settings"))
        different = [
            f"{name} {value!r} here, {theirs.get(name)!r} on rank 0"
            for name, value in json.loads(json.dumps(settings)).items()
            if theirs.get(name) != value
        ]
        if different:
            return f"{'; '.join(different)} on host {first.host}; start all ranks with the same settings"
        rank = next(r for r, arrival in self._arrivals.items() if arrival.settings != first.settings)
        return (
            f"rank {rank} on host {self._arrivals[rank].host} was started with other settings than rank 0, "
            "which its own message lists; start all ranks with the same settings"
        )

    def _absent(self, seconds: float) -> str:
        missing = [rank for rank in range(self._ranks.world_size) if rank not in self._arrivals]
        hosts = sorted({arrival.host for arrival in self._arrivals.values()})
        return (
            f"{_several('rank', missing)} of {self._ranks.world_size} not here after {seconds:.0f} s; the "
            f"others are, from {_several('host', hosts)}"
        )

    def _check_gpus(self) -> None:
        users: dict[str, int] = {}
        for rank, arrival in sorted(self._arrivals.items()):
            if arrival.gpu is None:
                continue
            other = users.setdefault(arrival.gpu, rank)
            if other != rank:
                raise UserError(
                    f"ranks {other} and {rank} on host {arrival.host} have the same GPU: each needs its own; "
                    "start no more processes than GPUs there, and where no launcher sets LOCAL_RANK, set it"
                )


def machine_in_words(meeting: Meeting, machine: str) -> str:
    """A machine as messages name it, e.g. ``host b (ranks 2, 3)``."""
    ranks = meeting.ranks_of(machine)
    return f"host {meeting.arrivals[ranks[0]].host} ({_several('rank', ranks)})"


def _own(ranks: Ranks, settings: Mapping[str, object]) -> Arrival:
    process = psutil.Process()
    host = socket.gethostname()
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
    return Arrival(
        host=host,
        machine=f"{host} {boot} {os.stat('/proc/self/ns/pid').st_ino}",
        pid=process.pid,
        created=process.create_time(),
        world_size=ranks.world_size,
        address=address_towards(ranks.master_addr, ranks.master_port) if ranks.master_addr else "",
        gpu=device_identity(),
        settings=hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
    )


def address_towards(host: str, port: int) -> str:
    """This machine's own address on the way to another; nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def network_interface(meeting: Meeting) -> str | None:
    """The interface of this machine towards the other processes of the job; None if it is not found."""
    interfaces = psutil.net_if_addrs()
    if meeting.is_on_one_machine:
        return LOOPBACK if LOOPBACK in interfaces else None
    own = meeting.arrivals[meeting.ranks.rank]
    address = own.address
    if ip_address(address).is_loopback:  # rank 0's host is its own meeting point: seen from another
        other = next(arrival for arrival in meeting.arrivals if arrival.machine != own.machine)
        address = address_towards(other.address, meeting.ranks.master_port)
    for name, addresses in interfaces.items():
        if any(found.address.split("%")[0] == address for found in addresses):
            return name
    return None


def _store(ranks: Ranks, deadline: float) -> dist.Store:
    try:
        socket.getaddrinfo(ranks.master_addr, ranks.master_port)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR = {ranks.master_addr!r}: this host knows no address of it ({error.strerror}); give "
            "the name or the address of rank 0's host"
        ) from None
    # torchrun's agent has opened the store, which it tells by this variable; else rank 0 does.
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    opens = ranks.rank == 0 and not of_agent
    while True:
        left = max(1.0, deadline - time.monotonic())
        try:
            store = dist.TCPStore(
                ranks.master_addr,
                ranks.master_port,
                is_master=opens,
                timeout=timedelta(seconds=min(left, REMINDER_SECONDS)),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (dist.DistError, ValueError) as error:
            if opens or time.monotonic() > deadline:
                raise _no_meeting(ranks, error) from error
            print(f"rank {ranks.rank}: rank 0 does not answer at {_place(ranks)} yet", file=sys.stderr)
        else:
            store.set_timeout(timedelta(seconds=left))
            # The agent's outlives the ranks: those that it starts again must not find what the first left.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            return dist.PrefixStore(f"attempt_{attempt}", store) if of_agent else store


def _no_meeting(ranks: Ranks, error: Exception) -> UserError:
    return UserError(
        f"{ranks.world_size} ranks cannot meet at {_place(ranks)} ({str(error).splitlines()[0]}); give the "
        "launcher a free --master_port, or set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free "
        "port"
    )


def _place(ranks: Ranks) -> str:
    return f"{ranks.master_addr}:{ranks.master_port}"


def _several(what: str, items: list) -> str:
    """``rank 3``, or ``ranks 1, 2``; long lists of numbers as ``ranks 4-7``."""
    texts = [str(item) for item in items]
    if len(items) > 2 and all(isinstance(item, int) for item in items) and items[-1] - items[0] < len(items):
        texts = [f"{items[0]}-{items[-1]}"]
    return f"{what}{'s' if len(items) > 1 else ''} {', '.join(texts)}"
