"""A host that is not as most is named; of two, the one without rank 0."""

import pytest

from inrank_megatron.preflight.findings import ERROR, Finding, rows_of, unlike_the_others
from tests.unit.preflight.several_hosts import hosts_with


@pytest.mark.parametrize(
    ("values", "named"),
    [("xx", ""), ("xyx", "b"), ("yxx", "a"), ("xy", "b"), ("xyz", "bc"), ("yxxy", "bc"), (["x", None], "b")],
)
def test_the_host_that_differs_is_named(values, named):
    hosts = hosts_with("row", *values)
    found = unlike_the_others(hosts, "row", "do as they do")
    assert "".join(finding.host for finding in found) == named


def test_a_finding_is_one_line():
    finding = Finding(ERROR, "torch", "b", "2.12", "must be 2.13", "install it")
    assert str(finding) == "host b: torch: 2.12: must be 2.13; install it"
    assert rows_of(hosts_with("row", 1, 2)) == ["row"]
