"""Predicted operations against products counted by hand, layer by layer."""

import pytest

from inrank_megatron.config.loading import from_flat, resolve
from inrank_megatron.config.topology import topology_of
from inrank_megatron.planning.operations import forward_flops, model_flops, step_flops
from inrank_megatron.planning.timeline import Phase

DENSE, FIRST, SECOND = (
    Phase("dense", None, None, False, 1),
    Phase("phase 1", 48, 48, True, 1),
    Phase("phase 2", 48, 48, False, 1),
)
TOKENS, WIDTH, LAYERS, COLUMNS = 256, 192, 4, 48


def flops(phase, world_size=1, *, on_cpu=True, **settings):
    run = resolve(from_flat({"model_preset": "tiny", "train_iters": 1} | settings), world_size=world_size)
    topology = topology_of(run, world_size=world_size)
    return step_flops(run, topology, phase, on_cpu=on_cpu), model_flops(run, topology, phase)


@pytest.mark.parametrize("phase", [DENSE, FIRST, SECOND], ids=lambda phase: phase.name)
def test_a_single_process_computes_everything_once(phase):
    once, per_token = flops(phase)
    assert once == TOKENS * per_token
    twice, _ = flops(phase, global_batch_size=2)
    assert twice == 2 * once


@pytest.mark.parametrize(
    ("phase", "split", "width", "products"),
    [
        (DENSE, True, 192, 0),
        (FIRST, True, 192, 6),
        (FIRST, False, 192, 6),
        (FIRST, True, 1344, 0),  # separate collectives
        (SECOND, True, 192, 0),
        (SECOND, False, 192, 4),
    ],
)
def test_what_tensor_parallel_ranks_all_compute(phase, split, width, products):
    """``products`` of T x k x h, of 2 (n - 1) / n operations each, in each of the two linears of a layer."""
    settings = {"hidden_size": width, "sequence_parallel": split, "tensor_model_parallel_size": 4}
    rank, per_token = flops(phase, 4, on_cpu=False, **settings)
    repeated = products * TOKENS * COLUMNS * width * 2 * LAYERS * 3 // 4
    assert rank == TOKENS * per_token // 4 + repeated


def test_recomputation_adds_a_forward_pass_of_the_layers():
    """A frozen W0 takes 2 operations of its 4 in the forward pass, all else a third."""
    run = resolve(from_flat({"model_preset": "tiny", "train_iters": 1}), world_size=1)
    topology = topology_of(run, world_size=1)
    for phase in (DENSE, FIRST, SECOND):
        plain, _ = flops(phase)
        again, _ = flops(phase, recompute_granularity="full")
        head = 2 * WIDTH * 4096
        assert again - plain == TOKENS * (forward_flops(run, topology, phase) - head)
    frozen = 2 * LAYERS * WIDTH * 4 * WIDTH
    assert forward_flops(run, topology, FIRST) - forward_flops(run, topology, SECOND) == 2 * frozen
