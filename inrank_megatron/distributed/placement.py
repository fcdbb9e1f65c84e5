"""Where the ranks of a job run: the network between its hosts, and groups that reach over several of them."""

import math
import os
from collections.abc import Sequence

from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.distributed.rendezvous import Meeting


def hosts_in_words(meeting: Meeting, parallel: Parallel, *, backend: str, sent: str) -> list[str]:
    """What to say at the start of a job on several hosts; nothing on one. Collective.

    Args:
        backend: ``gloo`` or ``nccl``.
        sent: what tensor parallelism sends per rank and step, in words.
    """
    if meeting.is_on_one_machine:
        return []
    interfaces = parallel.gather_from_all_ranks(os.environ.get(f"{backend.upper()}_SOCKET_IFNAME"))
    hosts = [arrival.host for arrival in meeting.arrivals]
    machines = [arrival.machine for arrival in meeting.arrivals]
    lines = [network_in_words(backend, interfaces, hosts=hosts, count=len(set(machines)))]
    if note := crossing_in_words(machines, hosts, parallel.tp_size, sent=sent):
        lines.append(note)
    return lines


def network_in_words(
    backend: str, interfaces: Sequence[str | None], *, hosts: Sequence[str], count: int
) -> str:
    """Over which interface the hosts communicate.

    Args:
        interfaces, hosts: of each rank; an interface is None where the library chooses.
        count: of the hosts.
    """
    found: dict[str | None, dict[str, None]] = {}
    for interface, host in zip(interfaces, hosts, strict=True):
        found.setdefault(interface, {})[host] = None
    name = f"{backend.upper()}_SOCKET_IFNAME"
    chosen = f"a network of its choice ({name} is not set)"
    texts = []
    for interface, there in found.items():
        where = "" if len(found) == 1 else f" on {', '.join(there)}"
        texts.append(f"{chosen if interface is None else f'{interface} ({name})'}{where}")
    return f"{count} hosts, connected by {backend} over {', '.join(texts)}"


def crossing_in_words(machines: Sequence[str], hosts: Sequence[str], size: int, *, sent: str) -> str | None:
    """What to say of tensor-parallel groups that are on more than one machine; None if there are none.

    Args:
        machines, hosts: of each rank; neighbouring ranks form a group.
        size: ranks of a group.
    """
    starts = range(0, len(machines), size)
    crossing = [start for start in starts if len(set(machines[start : start + size])) > 1]
    if not crossing:
        return None
    first = slice(crossing[0], crossing[0] + size)
    counts = [machines.count(machine) for machine in set(machines)]
    fitting = math.gcd(size, *counts)
    if fitting == size:
        remedy = "start the ranks host by host (srun --distribution=block, mpirun --map-by slot)"
    else:
        remedy = f"give --tensor-model-parallel-size {fitting}, or each host a multiple of {size} ranks"
    return (
        f"tensor parallelism crosses hosts in {len(crossing)} of {len(starts)} groups (ranks {first.start}-"
        f"{first.stop - 1} on {', '.join(dict.fromkeys(hosts[first]))}): every layer then waits for the "
        f"network, for about {sent} per rank and step; {remedy}"
    )
