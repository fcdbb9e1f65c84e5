"""What DeepSpeed is asked for on a GPU and on a CPU."""

import pytest
import torch

from inrank_megatron.config.costs import LARGEST_BUCKET, OVERLAPPED_BUCKET
from inrank_megatron.config.loading import from_flat
from inrank_megatron.engine.deepspeed_setup import deepspeed_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TRAINED, LARGEST = 700_000_000, 65_000_000


def zero(device, extra=None, largest=LARGEST, replicas=2, **settings):
    """The section on ZeRO."""
    config = from_flat({"model_preset": "tiny", "train_iters": 1} | settings)
    extra = {"zero_optimization": extra} if extra else None
    given = {"accumulation": 1, "trained": TRAINED, "largest": largest, "device": device, "extra": extra}
    return deepspeed_config(config, replicas=replicas, **given)["zero_optimization"]


@pytest.mark.parametrize("settings", [{"bf16": True}, {"fp16": True}, {"offload_optimizer": True}], ids=str)
def test_one_replica_in_fp32_needs_no_zero(settings):
    assert zero(GPU, zero_stage=1)["stage"] == zero(GPU, replicas=1, **settings)["stage"] == 1
    alone = zero(GPU, replicas=1, zero_stage=1)
    assert alone["stage"] == 0 and "overlap_comm" not in alone
    assert [zero(GPU, replicas=1, zero_stage=stage)["stage"] for stage in (2, 3)] == [2, 3]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_reductions_overlap_on_a_gpu_alone(stage):
    assert zero(GPU, zero_stage=stage)["overlap_comm"]
    assert zero(CPU, zero_stage=stage) == {"stage": stage, "reduce_bucket_size": LARGEST_BUCKET}


def test_nothing_overlaps_where_the_host_waits_for_each_gradient():
    offload = {"offload_optimizer": True}
    for stage in (1, 2):
        assert "overlap_comm" not in zero(GPU, zero_stage=stage, **offload)
    assert zero(GPU, zero_stage=3, **offload)["overlap_comm"]
    assert "overlap_comm" not in zero(GPU, zero_stage=0)


def test_a_bucket_holds_the_largest_parameter():
    """DeepSpeed's stage 2 frees a larger gradient while the stream of reductions still reads it."""
    assert zero(GPU, zero_stage=2)["reduce_bucket_size"] == LARGEST
    assert zero(GPU, zero_stage=2, largest=1000)["reduce_bucket_size"] == OVERLAPPED_BUCKET
    small = zero(GPU, {"reduce_bucket_size": LARGEST - 1}, zero_stage=2)
    assert small["reduce_bucket_size"] == LARGEST - 1 and "overlap_comm" not in small


def test_the_choice_of_the_user_wins():
    assert not zero(GPU, {"overlap_comm": False}, zero_stage=1)["overlap_comm"]
    both = zero(GPU, {"overlap_comm": True, "reduce_bucket_size": 10}, zero_stage=1)
    assert both == {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 10}
    pageable = zero(GPU, {"offload_optimizer": {"pin_memory": False}}, zero_stage=2, offload_optimizer=True)
    assert pageable["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


def test_offloaded_state_is_pinned_for_a_gpu():
    pinned = zero(GPU, zero_stage=1, offload_optimizer=True)["offload_optimizer"]
    assert pinned == {"device": "cpu", "pin_memory": True}
    assert zero(CPU, zero_stage=1, offload_optimizer=True)["offload_optimizer"] == {"device": "cpu"}
