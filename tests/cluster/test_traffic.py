"""What crosses between hosts, measured at their interfaces, against what the program counts."""

import json
from pathlib import Path

import pytest

from tests.cluster import counted
from tests.cluster.hosts import wait_until
from tests.cluster.trainings import SECONDS, started
from tests.distributed.launches import data_flags, last_step
from tests.forked import run_forked
from tests.harness import ROOT

FIRST, LAST = 10, 90


def test_only_data_parallel_traffic_leaves_a_host(cluster, trainings):
    """Bytes per step of both hosts, from what the interfaces have counted between two steps of a training.

    They include the headers: 66 bytes (Ethernet, IP, TCP) per segment, which a virtual cable carries with up
    to 64 KiB of data, and per acknowledgement.
    """
    told = run_forked(Path(counted.__file__)).stdout
    count = {name: 4 * value for name, value in json.loads(told.splitlines()[-1]).items()}  # of 4 ranks
    folder = trainings / "traffic"
    words = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--vocab-size", str(counted.VOCABULARY)]
    for name, value in counted.SIZES.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    batch = counted.MICRO_BATCH * counted.ACCUMULATION * counted.HOSTS
    words += ["--micro-batch-size", str(counted.MICRO_BATCH), "--global-batch-size", str(batch)]
    words += ["--tensor-model-parallel-size", str(counted.SLOTS), "--train-iters", str(LAST + 10)]
    words += [
        "--optimizer",
        "adamw",
        "--eval-interval",
        "1000",
        *data_flags(trainings / "data"),
        "--save",
        str(folder),
    ]

    def sent(device: str) -> int:
        return sum(host.sent(device) for host in cluster.hosts[: counted.HOSTS])

    seen = []
    with started(cluster, "torchrun_static.sh", words) as launch:
        for step in (FIRST, LAST):
            wait_until(lambda step=step: last_step(folder) >= step, launch.text, seconds=SECONDS)
            seen.append((last_step(folder), sent("eth0"), sent("lo")))
        assert not any(launch.wait()), launch.text()
    (first, *before), (last, *after) = seen
    between, inside = ((b - a) / (last - first) for a, b in zip(before, after, strict=True))
    measured = f"per step {between:,.0f} bytes between hosts and {inside:,.0f} inside; counted {count}"
    print(measured)
    assert between == pytest.approx(count["between"], rel=0.05), measured
    assert inside > count["inside"], measured  # Gloo sends a reduce-scatter as an all-reduce, twice as much
