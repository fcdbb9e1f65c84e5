"""What ``nvidia-smi`` says of GPUs, from a stand-in for it."""

import os
import time

import pytest

from inrank_megatron.preflight import devices
from inrank_megatron.preflight.devices import FIELDS, GPUS, Devices
from tests.unit.preflight.several_hosts import brief, hosts_with, places

CHECK = Devices()
GOOD = "0, NVIDIA H200, 600, 143771, 0, No, Not Active, Not Active, Not Active"
BAD = "1, NVIDIA H200, 90000, 143771, 2, Yes, Active, Active, Not Active"
OLD = "2, GeForce GTX 980, 10, 4000, [N/A], [N/A], [N/A], Not Active, [N/A]"


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Write what the stand-in prints and its status."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(devices, "device_count", lambda: 1)

    def write(output: str, status: int = 0, seconds: float = 0) -> dict:
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f"#!/bin/sh\nexec 3>&-\nsleep {seconds}\ncat <<'END'\n{output}\nEND\nexit {status}\n"
        )
        program.chmod(0o755)
        return CHECK.gather(places()[0])

    return write


def test_healthy_gpus(smi):
    found = smi(f"{GOOD}\n{OLD}")[GPUS]
    assert CHECK.shown(GPUS, found) == "1 x NVIDIA H200, 1 x GeForce GTX 980"
    assert found[0]["name"] == "NVIDIA H200" and found[0].keys() == {*FIELDS}
    assert brief(CHECK, hosts_with(GPUS, found)) == []


def test_each_fault_of_a_gpu_is_named(smi):
    found = brief(CHECK, hosts_with(GPUS, smi(GOOD)[GPUS], smi(f"{GOOD}\n{BAD}")[GPUS]))
    assert found == [
        ("error", "b", "GPU 1: 2 uncorrected memory errors"),
        ("warning", "b", "GPU 1: pages of its memory wait to be retired"),
        ("warning", "b", "GPU 1: slowed down by heat"),
        ("warning", "b", "GPU 1: 87.9 of 140.4 GiB of its memory are in use"),
    ]


def test_a_driver_that_fails_or_hangs(smi, monkeypatch):
    fault = smi("Failed to initialize NVML: Driver/library version mismatch", status=18)[GPUS]
    assert fault == "nvidia-smi fails: Failed to initialize NVML: Driver/library version mismatch"
    monkeypatch.setattr(devices, "QUERY_SECONDS", 0.2)
    began = time.monotonic()
    hangs = smi(GOOD, seconds=5)[GPUS]
    assert hangs == "nvidia-smi gives no answer in 0.2 s" and time.monotonic() - began < 4
    found = brief(CHECK, hosts_with(GPUS, fault, hangs))
    assert found == [("warning", "a", fault), ("warning", "b", hangs)]


def test_a_host_without_gpus_says_nothing():
    assert CHECK.gather(places()[0]) == {} and brief(CHECK, hosts_with("other", 1)) == []
