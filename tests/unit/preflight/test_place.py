"""One process of each host exchanges what it finds; nobody waits for ever."""

import pytest

from inrank_megatron.errors import UserError
from inrank_megatron.preflight import place as module
from inrank_megatron.preflight.place import nearest_folder
from tests.unit.preflight.several_hosts import on_all, places


def test_the_first_rank_of_each_host_gathers():
    sites = places(count=3, slots=2)
    assert [site.gathers for site in sites] == [True, False] * 3
    assert sites[5].number == 2 and sites[5].hosts == ["a", "b", "c"]
    gathering = [site for site in sites if site.gathers]
    assert on_all(lambda site: site.exchange("numbers", site.number), gathering) == [[0, 1, 2]] * 3


def test_a_host_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.1)
    sites = places(count=3)
    sites[1].publish("ports", 1)
    with pytest.raises(UserError, match=r"host c: no answer in 0\.1 s \(ports\); see whether"):
        sites[0].exchange("ports", 0)


def test_the_reason_of_one_ends_the_waiting_of_all():
    sites = places(count=2)
    sites[1].fail("host b: a reason")
    with pytest.raises(UserError, match="host b: a reason"):
        sites[0].exchange("ports", 0)


def test_the_nearest_folder_exists(tmp_path):
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path == nearest_folder(tmp_path)
