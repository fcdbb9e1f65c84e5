"""Which host or link is slow, from rates; the rates themselves are measured in tests/cluster."""

import itertools

import pytest

from inrank_megatron.preflight.bandwidth import INSIDE, LINKS, _rate, _rounds, judge
from inrank_megatron.preflight.findings import HostFacts
from tests.unit.preflight.several_hosts import NAMES, hosts_with


def named(slow: dict[tuple[int, int], float], count: int = 4, usual: float = 5e9) -> list[str]:
    """Host and value of each finding, with these links slower than the usual."""
    rates = [{str(b): slow.get((a, b), usual) for b in range(count) if a != b} for a in range(count)]
    hosts = [HostFacts(name, {LINKS: own}, {}) for name, own in zip(NAMES, rates, strict=False)]
    return [f"{finding.host} {finding.value}" for finding in judge(hosts)]


def test_equal_links_are_no_finding():
    assert named({}) == [] and named({(0, 1): 2e9, (2, 3): 9e9}) == []


def test_the_end_that_slow_links_have_in_common_is_named_once():
    assert named({(3, n): 1e6 for n in range(3)}) == ["d 0.001 GB/s to hosts a, b, c"]
    assert named({(n, 1): 1e6 for n in (0, 2, 3)}) == ["b 0.001 GB/s from hosts a, c, d"]
    assert named({(0, 1): 1e6}, count=2) == ["a 0.001 GB/s to host b"]


def test_links_that_are_all_slow():
    assert named({}, count=2, usual=1e7) == ["a 0.01 GB/s to host b", "b 0.01 GB/s to host a"]


def test_a_host_whose_own_ranks_are_slow():
    found = list(judge(hosts_with(INSIDE, 9e9, 8e9, 1e9)))
    assert [(finding.level, finding.host, finding.value) for finding in found] == [("warning", "c", "1 GB/s")]


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_every_pair_meets_once(count):
    rounds = _rounds(count)
    met = [tuple(sorted(pair)) for pairs in rounds for pair in pairs]
    assert sorted(met) == list(itertools.combinations(range(count), 2))
    for pairs in rounds:
        assert len({host for pair in pairs for host in pair}) == 2 * len(pairs)


def test_messages_grow_until_they_take_long_enough():
    counts = []

    def run(count: int) -> float:
        counts.append(count)
        return 4 * count / 1e8  # 100 MB/s

    assert _rate(run) == pytest.approx(1e8)
    assert [4 * count for count in counts] == [2**18, 2**18, 2**20, 2**20, 2**22, 2**22, 2**24, 2**24]
