"""Times of a step from rates that are given."""

import pytest

from inrank_megatron.config.cluster import parse_cluster, with_rates
from inrank_megatron.config.loading import from_flat, resolve
from inrank_megatron.config.topology import topology_of
from inrank_megatron.planning.seconds import step_time
from inrank_megatron.planning.timeline import Phase

DENSE, LAYERS, MICRO_BATCHES = Phase("dense", None, None, False, 1), 4, 3


def compute(cluster, stage, zero3_layer_us):
    """Seconds, of three micro-batches of four layers."""
    flat = {"model_preset": "tiny", "train_iters": 1, "zero_stage": stage}
    run = resolve(from_flat(flat | {"global_batch_size": 2 * MICRO_BATCHES}), world_size=2)
    topology = topology_of(run, world_size=2)
    rates = {"zero3_layer_us": zero3_layer_us}
    return step_time(run, topology, DENSE, with_rates(parse_cluster(cluster), rates)).compute


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_3_takes_the_hosts_time_for_each_layer_and_micro_batch(stage):
    more = compute("2xcpu", stage, 9000) - compute("2xcpu", stage, 1000)
    assert more == pytest.approx(LAYERS * MICRO_BATCHES * 0.008 if stage == 3 else 0)


def test_a_gpu_computes_meanwhile():
    """Whichever takes longer: what it computes here takes less than 50 microseconds a layer."""
    nothing, long = compute("2xH100", 3, 1e-6), compute("2xH100", 3, 9000)
    assert nothing < LAYERS * MICRO_BATCHES * 0.001
    assert long == pytest.approx(LAYERS * MICRO_BATCHES * (0.009 + 80 * 5e-6))
