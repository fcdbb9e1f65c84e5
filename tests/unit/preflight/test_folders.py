"""The run folder is shared, or the host that has one of its own is named."""

from dataclasses import replace

import pytest

from inrank_megatron.errors import UserError
from inrank_megatron.preflight import folders, place
from inrank_megatron.preflight.findings import HostFacts
from inrank_megatron.preflight.folders import CACHE, SAVE, Folders
from tests.unit.preflight.several_hosts import brief, on_all, places

CHECK = Folders()


def gathered(sites) -> list[HostFacts]:
    facts = on_all(CHECK.gather, sites)
    return [
        HostFacts(site.hosts[n], own, {row: CHECK.shown(row, value) for row, value in own.items()})
        for n, (site, own) in enumerate(zip(sites, facts, strict=True))
    ]


def test_a_shared_folder(tmp_path):
    hosts = gathered(places("--save", str(tmp_path / "runs" / "one"), "--data-cache-path", str(tmp_path)))
    assert {host.facts[row]["state"] for host in hosts for row in (SAVE, CACHE)} == {"shared"}
    assert brief(CHECK, hosts) == [] and list(tmp_path.iterdir()) == []


def test_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PATIENCE_SECONDS", 0.0)
    (tmp_path / "other").mkdir()
    first, second = places("--save", str(tmp_path / "run"), count=2)
    [other] = places("--save", str(tmp_path / "other" / "run"), count=1)
    hosts = gathered([first, replace(second, config=other.config)])
    assert brief(CHECK, hosts) == [("error", "b", f"{tmp_path}/other/run of its own")]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """Root may write anywhere."""
    monkeypatch.setattr(folders.os, "access", lambda path, mode: False)
    hosts = gathered(places("--save", str(tmp_path), count=2))
    assert [finding[:2] for finding in brief(CHECK, hosts)] == [("error", "a"), ("error", "b")]


def test_a_folder_in_which_rank_0_cannot_write(tmp_path, monkeypatch):
    """As on a disk that refuses; of the others none can tell whether it is shared."""

    def refuse(folder):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(folders, "mark", refuse)
    found = brief(CHECK, gathered(places("--save", str(tmp_path), count=2)))
    assert found == [("error", name, f"{tmp_path} cannot be written") for name in "ab"]


def test_a_host_that_does_not_answer_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(place, "PATIENCE_SECONDS", 0.1)
    first, _ = places("--save", str(tmp_path / "run"), "--data-cache-path", str(tmp_path), count=2)
    with pytest.raises(UserError, match="host b: no answer"):
        CHECK.gather(first)
    assert list(tmp_path.iterdir()) == []
