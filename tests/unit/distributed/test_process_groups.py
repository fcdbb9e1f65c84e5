"""Process groups where one process computes with many models."""

import os

import torch.distributed as dist

from tests.forked import run_forked
from tests.harness import run_ranks


def groups_and_threads() -> tuple[int, int]:
    return len(dist.distributed_c10d._world.pg_map), len(os.listdir("/proc/self/task"))


def counts(rank: int, world_size: int) -> tuple[list[tuple[int, int]], bool]:
    from inrank_megatron.distributed.process_groups import initialise, without_tensor_parallelism

    found = []
    for _ in range(3):
        parallel = without_tensor_parallelism(backend="gloo")
        found.append(groups_and_threads())
    sharded = initialise(backend="gloo", tensor_model_parallel_size=2)
    other = without_tensor_parallelism(backend="gloo")
    assert (sharded.tp_size, other.tp_size, other.dp_size) == (2, 1, 2)
    return found, without_tensor_parallelism(
        backend="gloo"
    ).dp_group is other.dp_group is not parallel.dp_group


def test_existing_groups_are_reused():
    for found, same in run_ranks(counts, 2):
        assert found[0] == found[1] == found[2] and same


ENDED = """
import torch.distributed as dist

from inrank_megatron.distributed.platform import prepare_process

prepare_process()
from inrank_megatron.distributed.process_groups import without_tensor_parallelism

before = without_tensor_parallelism(backend="gloo")
dist.destroy_process_group()  # as who ends a job without Megatron's knowledge
after = without_tensor_parallelism(backend="gloo")
assert after.dp_group is not before.dp_group
assert after.gather_from_all_ranks("here") == ["here"]
"""


def test_groups_of_an_ended_job_are_not_reused(tmp_path):
    (program := tmp_path / "ended.py").write_text(ENDED)
    done = run_forked(program)
    assert done.returncode == 0, done.stderr
