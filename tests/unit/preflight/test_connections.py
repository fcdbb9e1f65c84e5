"""Hosts that do not reach each other, and clocks that are astray."""

import socket

import pytest

from inrank_megatron.preflight import connections
from inrank_megatron.preflight.connections import CLOCK, CONNECTIONS, Connections, _offset
from inrank_megatron.preflight.findings import HostFacts
from tests.harness import free_port
from tests.unit.preflight.several_hosts import NAMES, brief, on_all, places

CHECK = Connections()


def hosts(unreachable: list[dict], clocks: list[float | None]) -> list[HostFacts]:
    facts = [{CONNECTIONS: u, CLOCK: at} for u, at in zip(unreachable, clocks, strict=True)]
    return [HostFacts(name, own, {}) for name, own in zip(NAMES, facts, strict=False)]


def test_all_reach_each_other():
    """Really, over this machine's loopback."""
    for found in on_all(CHECK.gather, places(count=3)):
        assert found[CONNECTIONS] == {} and abs(found[CLOCK]) < 0.5
        assert CHECK.shown(CONNECTIONS, found[CONNECTIONS]) == "to all hosts"
    assert CHECK.gather(places(count=1)[0]) == {}


def test_no_answer_has_a_reason(monkeypatch):
    assert _offset("127.0.0.1", free_port()) == "Connection refused"
    monkeypatch.setattr(connections, "CONNECT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert _offset("127.0.0.1", silent.getsockname()[1]) == "timed out"


def test_who_is_not_reached_is_named_once():
    found = brief(CHECK, hosts([{"2": "timed out"}, {"2": "timed out"}, {}], [0.0] * 3))
    assert found == [("error", "c", "not reached from hosts a, b (timed out)")]


@pytest.mark.parametrize(
    ("clocks", "named"),
    [
        ([0.0, 0.4, -0.5], []),
        ([0.0, 5.0, 0.0], [("warning", "b", "+5.0 s against the other hosts")]),
        ([0.0, 5.0, 5.1], [("warning", "a", "-5.0 s against the other hosts")]),  # rank 0's is astray
        ([0.0, 3.0], [("warning", "b", "+3.0 s against the other hosts")]),
        ([0.0, None, 0.0], []),
    ],
)
def test_the_clock_that_is_astray_is_named(clocks, named):
    assert brief(CHECK, hosts([{}] * len(clocks), clocks)) == named
