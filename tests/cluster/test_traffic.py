"""What crosses between hosts, measured at their interfaces, against what the program counts."""

import pytest
import torch

from inrank_megatron.benchmarks.blocks import DENSE, preset_config, rank_0_of
from inrank_megatron.benchmarks.collectives import Wire
from inrank_megatron.benchmarks.step import training_step
from inrank_megatron.engine.deepspeed_setup import stop_deepspeed
from tests.cluster.hosts import wait_until
from tests.cluster.services import SLOTS
from tests.cluster.trainings import SECONDS, started
from tests.distributed.launches import data_flags, last_step
from tests.harness import ROOT, run_ranks

FIRST, LAST = 10, 90
SIZES = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 64}
VOCABULARY, ACCUMULATION, HOSTS = 512, 2, 2
# An Ethernet, an IP and a TCP header, of which a segment of up to 64 KiB has one, and each acknowledgement.
HEADERS = 66


def count_step(rank: int, world_size: int) -> tuple[float, float, int]:
    """Of rank 0 per step: bytes in groups over both hosts, bytes in groups inside one, messages over both."""
    config = preset_config("tiny", **SIZES, micro_batch_size=2, tensor_model_parallel_size=SLOTS)
    with rank_0_of(SLOTS, replicas=HOSTS) as parallel:
        engine, run = training_step(config, DENSE, parallel, VOCABULARY, accumulation=ACCUMULATION)
        run()
        with torch.autograd.set_multithreading_enabled(False), Wire() as wire:
            run()
        stop_deepspeed(engine.deepspeed)
    crossing = [entry for entry in wire.collectives if len({member // SLOTS for member in entry.members}) > 1]
    inside = [entry for entry in wire.collectives if entry not in crossing]
    return sum(e.sent * e.itemsize for e in crossing), sum(e.sent * e.itemsize for e in inside), len(crossing)


def test_only_data_parallel_traffic_leaves_a_host(cluster, trainings):
    """Per step, from what the interfaces have counted between two steps of one training."""
    folder = trainings / "traffic"
    words = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--vocab-size", str(VOCABULARY)]
    for name, value in SIZES.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--micro-batch-size", "2", "--global-batch-size", str(2 * ACCUMULATION * HOSTS)]
    words += ["--tensor-model-parallel-size", str(SLOTS), "--train-iters", str(LAST + 10)]
    words += ["--eval-interval", "1000", *data_flags(trainings / "data"), "--save", str(folder)]

    def sent(device: str) -> int:
        return sum(host.sent(device) for host in cluster.hosts[:HOSTS])

    seen = []
    with started(cluster, "torchrun_static.sh", words) as launch:
        for step in (FIRST, LAST):
            wait_until(lambda step=step: last_step(folder) >= step, launch.text, seconds=SECONDS)
            seen.append((last_step(folder), sent("eth0"), sent("lo")))
        assert not any(launch.wait()), launch.text()
    (first, *before), (last, *after) = seen
    between, within = ((b - a) / (last - first) for a, b in zip(before, after, strict=True))
    ranks = HOSTS * SLOTS
    crossing, inside, messages = run_ranks(count_step, 1)[0]
    headers = 2 * HEADERS * messages * ranks
    print(
        f"bytes per step: {between:.0f} between hosts, {within:.0f} inside; counted: {ranks * crossing:.0f}"
    )
    assert between == pytest.approx(ranks * crossing + headers, rel=0.05)
    assert within > 0.9 * ranks * inside
