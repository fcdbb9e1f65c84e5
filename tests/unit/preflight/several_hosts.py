"""Hosts of a job as threads with one store, to gather on all of them."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from inrank_megatron.config.cli import parse
from inrank_megatron.config.topology import topology_of
from inrank_megatron.distributed.launcher import Ranks
from inrank_megatron.distributed.rendezvous import Meeting
from inrank_megatron.distributed.roll import Arrival
from inrank_megatron.preflight.findings import Check, Finding, HostFacts
from inrank_megatron.preflight.place import Place

NAMES = ("a", "b", "c", "d")
MODEL = ["--inrank", "--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"]


def places(*flags: str, count: int = 3, slots: int = 1) -> list[Place]:
    """The places of ``slots`` ranks on each of ``count`` hosts, in the order of the ranks."""
    size, store = count * slots, dist.HashStore()
    config = parse([*MODEL, "--global-batch-size", "24", *flags], world_size=size).config
    topology = topology_of(config, world_size=size, vocab_size=None)
    arrivals = [
        Arrival(NAMES[rank // slots], NAMES[rank // slots], rank, 0.0, size, "127.0.0.1", None, "digest")
        for rank in range(size)
    ]
    ranks = [Ranks(rank, size, master_addr="127.0.0.1", master_port=1) for rank in range(size)]
    return [Place(config, topology, {}, Meeting(own, store, arrivals)) for own in ranks]


def on_all(function: Any, sites: list[Place]) -> list[Any]:
    """``function(place)`` of all at once."""
    with ThreadPoolExecutor(len(sites)) as pool:
        return list(pool.map(function, sites))


def hosts_with(row: str, *values: Any, texts: Any = str) -> list[HostFacts]:
    """Hosts with these values of one row."""
    return [
        HostFacts(name, {row: value}, {row: texts(value)}) for name, value in zip(NAMES, values, strict=False)
    ]


def brief(check: Check, hosts: list[HostFacts]) -> list[tuple[str, str, str]]:
    """Level, host and value of each finding."""

    def words(finding: Finding) -> tuple[str, str, str]:
        return finding.level, finding.host, finding.value

    return [words(finding) for finding in check.judge(hosts)]
