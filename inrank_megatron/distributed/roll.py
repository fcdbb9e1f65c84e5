"""The roll of a job: what each process says of itself, compared before there is any process group.

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
from pathlib import Path

import psutil
import torch.distributed as dist

from inrank_megatron.distributed.launcher import Ranks
from inrank_megatron.distributed.listed_hosts import listed_hosts
from inrank_megatron.distributed.platform import device_identity
from inrank_megatron.errors import UserError

POLL_SECONDS = 0.1
REMINDER_SECONDS = 60.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Arrival:
    """What a process says of itself.

    Attributes:
        machine: distinguishes machines, and containers on one that do not see each other's processes.
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
                f"{meeting_point(self._ranks)}; give every process its own RANK, and every job its own "
                "MASTER_PORT"
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
        listed = listed_hosts()
        theirs = list(dict.fromkeys(listed[rank] for rank in missing if rank < len(listed)))
        where = f", of {several('host', theirs)}," if theirs else ""
        return (
            f"{several('rank', missing)} of {self._ranks.world_size}{where} not here after {seconds:.0f} s; "
            f"the others are, from {several('host', hosts)}"
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


def own_arrival(ranks: Ranks, settings: Mapping[str, object]) -> Arrival:
    """What this process says of itself."""
    process = psutil.Process()
    host = socket.gethostname()
    address = ""
    if ranks.master_addr and ranks.master_port:
        address = address_towards(ranks.master_addr, ranks.master_port)
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
    return Arrival(
        host=host,
        machine=f"{host} {boot} {os.stat('/proc/self/ns/pid').st_ino}",
        pid=process.pid,
        created=process.create_time(),
        world_size=ranks.world_size,
        address=address,
        gpu=device_identity(),
        settings=hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
    )


def address_towards(host: str, port: int) -> str:
    """This machine's own address on the way to another; nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def meeting_point(ranks: Ranks) -> str:
    """Where the ranks of a job meet, ``host:port``."""
    return f"{ranks.master_addr}:{ranks.master_port}"


def several(what: str, items: list) -> str:
    """``rank 3``, or ``ranks 1, 2``; long lists of numbers as ``ranks 4-7``."""
    texts = [str(item) for item in items]
    if len(items) > 2 and all(isinstance(item, int) for item in items) and items[-1] - items[0] < len(items):
        texts = [f"{items[0]}-{items[-1]}"]
    return f"{what}{'s' if len(items) > 1 else ''} {', '.join(texts)}"
