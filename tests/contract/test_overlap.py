"""Reductions that overlap with the backward pass train as those after it do.

On a CPU, where they cannot overlap in time: what is seen is DeepSpeed's other way through the buckets, which
GPUs take, with its two buffers by turns. Streams and races are not.
"""

import pytest
import torch
import torch.distributed as dist

from tests.contract.checkpoints import leave_and_go_on, resume
from tests.contract.layouts import Layout
from tests.contract.sessions import build
from tests.harness import run_ranks

BUCKET = 40_000
"""Entries, of the 135 thousand that are trained; the largest parameter has 32,768."""
CASES = {
    "fp32 ZeRO 1": ({"zero_stage": 1}, 0),
    "fp32 ZeRO 2": ({"zero_stage": 2}, 0),
    "bf16 ZeRO 1": ({"zero_stage": 1, "bf16": True}, 1e-4),  # which is another optimizer of DeepSpeed's
    "bf16 ZeRO 2": ({"zero_stage": 2, "bf16": True}, 0),
}


def trained(rank: int, world_size: int) -> dict[str, list[tuple]]:
    """By case: losses, norms, DeepSpeed's optimizer, with reductions after the backward pass and within."""
    return {
        name: [_train(settings, zero) for zero in ({}, {"overlap_comm": True})]
        for name, (settings, _) in CASES.items()
    }


def _train(settings: dict, zero: dict) -> tuple:
    json = {"zero_optimization": zero | {"reduce_bucket_size": BUCKET}}
    session = build("dense", Layout(2), deepspeed_json=json, **settings).start()
    for _ in range(3):
        session.train_step()
    kind = type(session.engine.deepspeed.optimizer).__name__
    return session.losses, session.grad_norms, kind


def crossed(rank: int, world_size: int) -> list[tuple[dict, dict]]:
    """BF16 under ZeRO 1, left by one of DeepSpeed's two optimizers and gone on with by the other: from a CPU
    to a GPU on two replicas, and back on two tensor-parallel ranks.
    """
    ways = [
        {"zero_stage": 1, "bf16": True, "deepspeed_json": {"zero_optimization": zero}}
        for zero in ({"reduce_bucket_size": BUCKET}, {"reduce_bucket_size": BUCKET, "overlap_comm": True})
    ]
    found = []
    for layout, (first, second) in ((Layout(2), ways), (Layout(2, 2), ways[::-1])):
        left = leave_and_go_on(rank, world_size, "inrank", layout, 1, 1, first)
        box = [left["tensors"]]
        dist.broadcast_object_list(box)
        left["tensors"] = box[0]
        found.append((left, resume(rank, world_size, "inrank", layout, 1, 1, left, second)))
    return found


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[tuple]]:
    return run_ranks(trained, 2)[0]


@pytest.mark.parametrize("case", CASES)
def test_overlapped_reductions_match_those_after_the_backward_pass(outcomes, case):
    (after, norms_after, _), (within, norms_within, kind) = outcomes[case]
    tolerance = CASES[case][1]
    assert within == pytest.approx(after, rel=tolerance, abs=0)
    assert norms_within == pytest.approx(norms_after, rel=10 * tolerance, abs=0)
    assert kind == "DeepSpeedZeroOptimizer"


def test_bf16_state_loads_into_the_other_deepspeed_optimizer():
    for left, read in run_ranks(crossed, 2)[0]:
        assert read["tensors"].keys() == left["tensors"].keys() and read["record"] == left["record"]
        assert all(torch.equal(read["tensors"][name], tensor) for name, tensor in left["tensors"].items())
        assert read["losses"] == pytest.approx(left["losses"], rel=1e-4, abs=0)
