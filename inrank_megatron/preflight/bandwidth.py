"""How fast ranks communicate inside of a host and between hosts, and which link is slow."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from inrank_megatron.distributed.platform import device
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.distributed.roll import several
from inrank_megatron.preflight.findings import WARNING, Finding, HostFacts
from inrank_megatron.preflight.place import Place

INSIDE, BETWEEN, LINKS = "all-reduce in the host", "all-reduce between hosts", "links"
SMALLEST, LARGEST = 2**18, 2**26  # bytes of a message, four times as long until it takes long enough
LONG_ENOUGH = 0.05  # seconds
MOST_ROUNDS = 8
SLOW_SHARE = 0.25  # of what most do
SLOW_RATE = 0.1e9  # bytes per second: less than Ethernet of 1 Gbit/s


def measure(place: Place, parallel: Parallel) -> list[HostFacts]:
    """The rates of every host, in bytes per second. Collective; the same on every rank."""
    buffer = torch.zeros(LARGEST // 4, device=device())
    facts: dict[str, Any] = {}
    machines = [place.meeting.ranks_of(machine) for machine in place.machines]
    groups = [dist.new_group(ranks) for ranks in machines]
    between = dist.new_group(place.first_ranks)
    if len(machines[place.number]) > 1:
        facts[INSIDE] = _all_reduce_rate(buffer, groups[place.number])
    parallel.barrier()
    if place.gathers and len(machines) > 1:
        facts[BETWEEN] = _all_reduce_rate(buffer, between)
        facts[LINKS] = _link_rates(place, buffer)
    told = parallel.gather_from_all_ranks(facts)
    return [_facts_of(place.hosts[n], told[rank]) for n, rank in enumerate(place.first_ranks)]


def judge(hosts: Sequence[HostFacts]) -> Iterator[Finding]:
    """Findings about hosts and links that are slower than the others."""
    inside = {host.host: host.facts[INSIDE] for host in hosts if INSIDE in host.facts}
    for name, rate in inside.items():
        if rate < SLOW_SHARE * statistics.median(inside.values()):
            rule = f"the other hosts reach {_shown(statistics.median(inside.values()))}"
            yield Finding(
                WARNING, INSIDE, name, _shown(rate), rule, "compare nvidia-smi topo -m of the hosts"
            )
    yield from _slow_links(hosts)


def _facts_of(host: str, facts: dict[str, Any]) -> HostFacts:
    texts = {row: _shown(value) for row, value in facts.items() if row != LINKS}
    if LINKS in facts:
        texts[LINKS] = f"{_shown(min(facts[LINKS].values()))} or more to each"
    return HostFacts(host, facts, texts)


def _slow_links(hosts: Sequence[HostFacts]) -> Iterator[Finding]:
    """One finding for each end that slow links have in common, as a cable or a card that is at fault."""
    rates = {
        (n, int(to)): rate for n, host in enumerate(hosts) for to, rate in host.facts.get(LINKS, {}).items()
    }
    if not rates:
        return
    usual = statistics.median(rates.values())
    slow = {link for link, rate in rates.items() if rate < max(SLOW_RATE, SLOW_SHARE * usual)}
    while slow:
        ends = [(side, link[side]) for link in slow for side in (0, 1)]
        side, end = max(dict.fromkeys(sorted(ends)), key=ends.count)
        own = sorted(link for link in slow if link[side] == end)
        others = [hosts[link[1 - side]].host for link in own]
        slow -= set(own)
        yield Finding(
            WARNING,
            LINKS,
            hosts[end].host,
            f"{_shown(min(rates[link] for link in own))} {('to', 'from')[side]} {several('host', others)}",
            f"slow: most links reach {_shown(max(rates.values()))}",
            "see its cable, port and card (ethtool, ibstat), and which network GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME names",
        )


def _all_reduce_rate(buffer: torch.Tensor, group: dist.ProcessGroup) -> float:
    """Bytes that each rank sends per second in an all-reduce by a ring, 2 (n - 1) / n of its message."""

    def run(count: int) -> float:
        dist.barrier(group)
        began = time.monotonic()
        dist.all_reduce(buffer[:count], group=group)
        buffer[0].item()
        seconds = torch.tensor(time.monotonic() - began, device=buffer.device, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX, group=group)
        return float(seconds.item())

    n = group.size()
    return 2 * (n - 1) / n * _rate(run)


def _link_rates(place: Place, buffer: torch.Tensor) -> dict[str, float]:
    """Bytes per second from the first rank of this host to that of others, by their numbers.

    All hosts measure at once, in pairs; with many hosts each of them meets some others only.
    """
    rates: dict[str, float] = {}
    for pairs in _rounds(len(place.hosts))[:MOST_ROUNDS]:
        for one, two in pairs:
            for sender, receiver in ((one, two), (two, one)):
                if place.number == sender:
                    rates[str(receiver)] = _send(buffer, place.first_ranks[receiver])
                elif place.number == receiver:
                    _receive(buffer, place.first_ranks[sender])
    return rates


def _rounds(count: int) -> list[list[tuple[int, int]]]:
    """All pairs of ``count`` hosts in rounds, in each of which a host is in one pair at most."""
    circle: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    rounds = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(a, b) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def _send(buffer: torch.Tensor, to: int) -> float:
    go_on = torch.ones(1, device=buffer.device)

    def run(count: int) -> float:
        dist.send(go_on, to)
        began = time.monotonic()
        dist.send(buffer[:count], to)
        dist.recv(go_on, to)
        go_on.item()
        return time.monotonic() - began

    rate = _rate(run)
    dist.send(torch.zeros(1, device=buffer.device), to)
    return rate


def _receive(buffer: torch.Tensor, sender: int) -> None:
    go_on = torch.ones(1, device=buffer.device)
    for count in _counts():
        dist.recv(go_on, sender)
        if not go_on.item():
            return
        dist.recv(buffer[:count], sender)
        dist.send(go_on, sender)
    dist.recv(go_on, sender)


def _counts() -> Iterator[int]:
    """Elements of the messages, each length twice: the first connects."""
    size = SMALLEST
    while size <= LARGEST:
        yield from (size // 4, size // 4)
        size *= 4


def _rate(run: Callable[[int], float]) -> float:
    """Bytes per second of the best message; twice the same length that takes long enough is the last.

    One alone may have waited for a processor.

    Args:
        run: sends so many elements of 4 bytes; the seconds that it took.
    """
    best, before = 0.0, 0.0
    for number, count in enumerate(_counts()):
        seconds = run(count)
        best = max(best, 4 * count / seconds)
        if number % 2 and min(before, seconds) > LONG_ENOUGH:
            break
        before = seconds
    return best


def _shown(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"
