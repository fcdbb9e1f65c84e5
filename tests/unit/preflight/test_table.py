"""The table and its JSON."""

from inrank_megatron.preflight.findings import ERROR, WARNING, Finding
from inrank_megatron.preflight.table import json_of, rows, text_of
from tests.unit.preflight.several_hosts import hosts_with

FINDINGS = [
    Finding(ERROR, "torch", "b", "2.12", "must be 2.13", "install it"),
    Finding(WARNING, "clock", "a", "1", "", ""),
]


def test_hosts_with_one_value_are_a_row():
    table = rows(hosts_with("torch", "2.13", "2.12", "2.13"), FINDINGS)
    assert [(row.hosts, row.value, row.verdict) for row in table] == [
        (("a", "c"), "2.13", "ok"),
        (("b",), "2.12", "error"),
    ]
    lines = text_of(table, FINDINGS[:1], hosts=3, seconds=1.25).splitlines()
    assert lines[0].split() == ["check", "hosts", "value", "verdict"]
    assert lines[1].split() == ["torch", "a,", "c", "2.13", "ok"]
    assert lines[-2:] == [
        "error: host b: torch: 2.12: must be 2.13; install it",
        "hosts: 3; errors: 1; warnings: 0; seconds: 1.2",
    ]


def test_json():
    table = rows(hosts_with("torch", "2.13", "2.12"), FINDINGS)
    found = json_of(table, FINDINGS, seconds=1.234)
    assert not found["passed"] and found["seconds"] == 1.23 and len(found["findings"]) == 2
    assert found["rows"][1] == {"check": "torch", "hosts": ("b",), "value": "2.12", "verdict": "error"}
    assert json_of(table, FINDINGS[1:], seconds=0)["passed"]
