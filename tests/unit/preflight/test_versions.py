"""Hosts with other software: what must be alike is an error, the rest a warning."""

import shutil
from pathlib import Path

import pytest

import inrank_megatron
from inrank_megatron.preflight.versions import ROWS, Versions, _of_gpus, source_digest
from tests.unit.preflight.several_hosts import brief, hosts_with, places


def test_what_is_installed_is_found():
    found = Versions().gather(places()[0])
    assert {"inrank-megatron", "Python", "torch", "deepspeed", "megatron-core", "numpy"} <= found.keys()
    assert found.keys() <= {*ROWS}
    assert found["inrank-megatron"] == f"{inrank_megatron.__version__} {source_digest()}"


@pytest.mark.parametrize(
    ("row", "values", "level"),
    [
        ("torch", ("2.13.0", "2.12.0"), "error"),
        ("inrank-megatron", ("0.2.0 aaa", "0.2.0 bbb"), "error"),
        ("tokenizers", ("0.23.1", "0.23.2"), "warning"),
        ("Python", ("3.11.2", "3.11.7"), "warning"),
        ("Python", ("3.11.2", "3.12.2"), "error"),
        ("NVIDIA driver", ("550.54.14", "535.104.05"), "warning"),
    ],
)
def test_another_version_is_named(row, values, level):
    assert brief(Versions(), hosts_with(row, *values)) == [(level, "b", values[1])]
    assert brief(Versions(), hosts_with(row, values[0], values[0])) == []


def test_a_package_that_is_missing_is_named():
    hosts = hosts_with("datasets", "5.2.0", "5.2.0", None)
    hosts[2].facts.clear()
    assert brief(Versions(), hosts) == [("warning", "c", "none")]


def test_the_digest_is_of_every_source_file(tmp_path, monkeypatch):
    package = tmp_path / "inrank_megatron"
    shutil.copytree(Path(inrank_megatron.__path__[0]), package, ignore=shutil.ignore_patterns("__pycache__"))
    before = source_digest()
    monkeypatch.setattr(inrank_megatron, "__path__", [str(package)])
    assert source_digest() == before
    with (package / "lowrank" / "simple.py").open("a") as file:
        file.write("\n")
    assert source_digest() != before


def test_the_driver_is_read(tmp_path):
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\nGCC version: 12.2\n"
    )
    assert _of_gpus(file)["NVIDIA driver"] == "535.104.05"
    assert "NVIDIA driver" not in _of_gpus(tmp_path / "none")
