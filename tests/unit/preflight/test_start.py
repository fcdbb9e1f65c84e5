"""What a start makes of findings: an error ends all ranks alike, a warning is a note."""

import pytest

from inrank_megatron.errors import UserError
from inrank_megatron.preflight import start
from inrank_megatron.preflight.findings import ERROR, WARNING, Finding
from inrank_megatron.preflight.start import CHECKS, check_start, gathered, judged
from tests.unit.preflight.several_hosts import on_all, places


class Planted:
    """A check with findings of its own."""

    on_one_host = False

    def __init__(self, *levels: str, fault: Exception | None = None):
        self.levels, self.fault, self.calls = levels, fault, 0

    def gather(self, place):
        self.calls += 1
        if self.fault and place.number == 1:
            raise self.fault
        return {"row": place.number}

    def judge(self, hosts):
        assert [host.facts["row"] for host in hosts] == list(range(len(hosts)))
        for level in self.levels:
            yield Finding(level, "row", "b", "1", "must be 0", "make it so")

    def shown(self, row, value):
        return str(value)


def told(place) -> str:
    try:
        return "; ".join(check_start(place))
    except UserError as error:
        return f"refused: {error}"


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ((), ""),
        ((WARNING,), "warning: host b: row: 1: must be 0; make it so"),
        (
            (WARNING, ERROR),
            "refused: host b: row: 1: must be 0; make it so (one of 2 findings); tools/",
        ),
    ],
)
def test_findings_are_told_alike_on_all_ranks(monkeypatch, levels, words):
    check = Planted(*levels)
    monkeypatch.setattr(start, "CHECKS", (check,))
    found = on_all(told, places(count=2, slots=2))
    assert len(set(found)) == 1 and found[0].startswith(words) and bool(found[0]) == bool(words)
    assert check.calls == 2  # one process of each host


def test_a_host_that_cannot_find_out_ends_all(monkeypatch):
    monkeypatch.setattr(start, "CHECKS", (Planted(fault=UserError("host b: hangs")),))
    assert on_all(told, places(count=2, slots=2)) == ["refused: host b: hangs"] * 4
    monkeypatch.setattr(start, "CHECKS", (Planted(fault=ZeroDivisionError()),))
    first, failing, *_ = places(count=2)
    with pytest.raises(ZeroDivisionError):
        check_start(failing)
    assert told(first).startswith("refused: host b has failed to check itself (ZeroDivisionError)")


def test_a_run_on_one_host_makes_the_check_of_space_alone(monkeypatch):
    monkeypatch.setattr(start, "CHECKS", (check := Planted(ERROR),))
    assert on_all(told, places(count=1, slots=2)) == ["", ""] and check.calls == 0
    assert [type(check).__name__ for check in CHECKS if check.on_one_host] == ["Space"]


def test_every_check_has_something_to_say_of_one_host(tmp_path):
    [place] = places("--save", str(tmp_path), count=1)
    hosts = gathered(CHECKS, place)
    assert {"torch", "data", "free for checkpoints"} <= hosts[0].texts.keys() and not judged(CHECKS, hosts)
