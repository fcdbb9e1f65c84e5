"""What rank 0 does for all may take longer than a collective waits."""

import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from inrank_megatron.distributed.launcher import Ranks
from inrank_megatron.distributed.rendezvous import Meeting
from inrank_megatron.errors import UserError
from tests.groups import join
from tests.harness import RankError, run_ranks


def slow_choice(rank: int, world_size: int, fails: bool) -> str:
    """Of three times what a collective waits."""
    parallel = join(1)
    meeting = Meeting(Ranks(rank, world_size), dist.distributed_c10d._get_default_store(), [])
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5))
    try:
        return parallel.broadcast_from_rank_0_when_ready(
            lambda: _choose(fails), meeting, f"a folder ({fails})"
        )
    finally:
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=5))


def _choose(fails: bool) -> str:
    time.sleep(1.5)
    if fails:
        raise UserError("no checkpoint of it is complete")
    return "runs/one"


def test_the_others_wait_for_a_long_hash():
    assert run_ranks(slow_choice, 2, False) == ["runs/one"] * 2


def test_they_learn_of_its_refusal():
    with pytest.raises(RankError, match="UserError: no checkpoint of it is complete"):
        run_ranks(slow_choice, 2, True)
