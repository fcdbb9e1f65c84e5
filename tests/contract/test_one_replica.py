"""One replica in FP32 trains without ZeRO, of which stage 1 would copy gradients and parameters alone."""

from unittest import mock

import pytest

from inrank_megatron.config.costs import zero_stage_in_use
from inrank_megatron.engine import deepspeed_setup
from tests.contract.layouts import LAYOUTS
from tests.contract.sessions import build
from tests.harness import run_ranks

CLIP = 0.05  # far below the norms


def trained(rank: int, world_size: int, layout: str) -> list[tuple]:
    """Stage, losses, norms and weights of a training in the stage of a run, and in the one it asks for."""
    found = []
    for stage_of in (zero_stage_in_use, lambda config, replicas: config.parallel.zero_stage):
        with mock.patch.object(deepspeed_setup, "zero_stage_in_use", stage_of):
            session = build("inrank", LAYOUTS[layout], clip_grad=CLIP).start().train(4)
        engine = session.engine
        weights = {name: weight.tolist() for name, weight in engine.parameters()}
        stage = engine.deepspeed.zero_optimization_stage()
        found.append((stage, session.losses, session.grad_norms, session.ranks, weights))
    return found


@pytest.mark.parametrize("layout", ["TP1 DP1", "TP2 SP"])
def test_one_replica_trains_without_zero_to_the_same_bits(layout):
    for plain, sharded in run_ranks(trained, LAYOUTS[layout].world_size, layout):
        assert (plain[0], sharded[0]) == (0, 1)
        assert min(plain[2]) > CLIP
        assert plain[1:] == sharded[1:]
