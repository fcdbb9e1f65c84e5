"""What the checks say of the hosts of a job: facts of each host, and findings about them."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from inrank_megatron.preflight.place import Place

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Finding:
    """One fault. ``level``: ``error`` stops training, ``warning`` does not. ``row``: the fact it is about."""

    level: str
    row: str
    host: str
    value: str
    rule: str
    remedy: str

    def __str__(self) -> str:
        return f"host {self.host}: {self.row}: {self.value}: {self.rule}; {self.remedy}"


@dataclass(frozen=True)
class HostFacts:
    """``facts``: row -> value, as JSON has it, of the host with that name; ``texts``: as the table has it."""

    host: str
    facts: dict[str, Any]
    texts: dict[str, str]


class Check(Protocol):
    """One kind of fact about a host.

    Attributes:
        on_one_host: whether a run on one host makes it too when it starts.
    """

    on_one_host: bool

    def gather(self, place: Place) -> dict[str, Any]:
        """The facts of this host, row by row, as JSON has them. Called on one process of every host."""

    def judge(self, hosts: Sequence[HostFacts]) -> Iterator[Finding]:
        """The findings, the same on every process. Called with the facts of all hosts, rank 0's first."""

    def shown(self, row: str, value: Any) -> str:
        """A fact as the table has it."""


def rows_of(hosts: Sequence[HostFacts]) -> list[str]:
    """All rows, in the order in which hosts have them."""
    return list(dict.fromkeys(row for host in hosts for row in host.facts))


def unlike_the_others(
    hosts: Sequence[HostFacts],
    row: str,
    remedy: str,
    *,
    shown: Callable[[Any], str] = str,
    level: Callable[[Any, Any], str] = lambda value, usual: ERROR,
) -> Iterator[Finding]:
    """A finding for each host whose value is not that of most; with as many of two, rank 0's host is right.

    Args:
        shown: a value as the finding has it. level: of a value and that of the others.
    """
    values = [json.dumps(host.facts.get(row), sort_keys=True) for host in hosts]
    counts = Counter(values)
    usual = max(values, key=counts.__getitem__)  # of several the first
    others = json.loads(usual)
    for host, value in zip(hosts, values, strict=True):
        if value != usual:
            own, rule = host.facts.get(row), f"must be as on the other hosts ({shown(others)})"
            yield Finding(level(own, others), row, host.host, shown(own), rule, remedy)
