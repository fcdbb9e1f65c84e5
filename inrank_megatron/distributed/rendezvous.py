"""Where the processes of a job meet, before any process group: a store, where ``roll.py`` compares them."""

import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address

import psutil
import torch.distributed as dist

from inrank_megatron.distributed.launcher import Ranks, adopt_ranks
from inrank_megatron.distributed.roll import (
    POLL_SECONDS,
    REMINDER_SECONDS,
    Arrival,
    Roll,
    address_towards,
    meeting_point,
    own_arrival,
    several,
)
from inrank_megatron.errors import UserError

LOOPBACK = "lo"


@dataclass(frozen=True)
class Meeting:
    """``arrivals``: of all ranks, in their order."""

    ranks: Ranks
    store: dist.Store
    arrivals: list[Arrival]

    @property
    def is_on_one_machine(self) -> bool:
        return len({arrival.machine for arrival in self.arrivals}) == 1

    @property
    def leaders(self) -> tuple[int, ...]:
        """Of each rank, the first one on its machine."""
        return tuple(min(self.ranks_of(arrival.machine)) for arrival in self.arrivals)

    def ranks_of(self, machine: str) -> list[int]:
        return [rank for rank, arrival in enumerate(self.arrivals) if arrival.machine == machine]

    def address_of(self, rank: int) -> str:
        """Where other machines reach the one of that rank."""
        address = self.arrivals[rank].address
        # Rank 0's host knows itself by a loopback address where it is itself the meeting point.
        loopback = ip_address(address.split("%")[0]).is_loopback
        return self.ranks.master_addr if loopback else address

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
                        f"{several('rank', missing)} of {len(keys)} without {what} after "
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
        return Meeting(ranks, dist.HashStore(), [own_arrival(ranks, settings)])
    deadline = time.monotonic() + 60 * timeout_minutes
    store = _store(ranks, deadline)
    roll = Roll(ranks, store)
    try:
        roll.enter(own_arrival(ranks, settings), settings)
        return Meeting(ranks, store, roll.call(settings, deadline))
    except dist.DistError as error:
        raise _no_meeting(ranks, error) from error


def machine_in_words(meeting: Meeting, machine: str) -> str:
    """A machine as messages name it, e.g. ``host b (ranks 2, 3)``."""
    ranks = meeting.ranks_of(machine)
    return f"host {meeting.arrivals[ranks[0]].host} ({several('rank', ranks)})"


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
            f"MASTER_ADDR = {ranks.master_addr!r}: this host finds no address for it ({error.strerror}); "
            "give the name or the address of rank 0's host"
        ) from None
    # torchrun's agent has opened the store, which this variable says; else rank 0 does.
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
            print(f"rank {ranks.rank}: rank 0 does not answer at {meeting_point(ranks)} yet", file=sys.stderr)
        else:
            store.set_timeout(timedelta(seconds=left))
            # The agent's outlives the ranks: those that it starts again must not find what the first left.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            return dist.PrefixStore(f"attempt_{attempt}", store) if of_agent else store


def _no_meeting(ranks: Ranks, error: Exception) -> UserError:
    return UserError(
        f"{ranks.world_size} ranks cannot meet at {meeting_point(ranks)} ({str(error).splitlines()[0]}); "
        "give the launcher a free --master_port, or set MASTER_ADDR to the host of rank 0 and MASTER_PORT to "
        "a free port"
    )
