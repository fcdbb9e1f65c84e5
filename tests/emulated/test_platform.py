"""What a process makes of a machine with GPUs before it trains."""

import os

import torch

from tests.emulated.device import run_emulated

CORES = len(os.sched_getaffinity(0))


def threads(local_world_size: int, given: str | None) -> tuple[int, int]:
    """Of rank 0, before and in a launch that says nothing of them, or what ``given`` says."""
    from inrank_megatron.distributed.platform import prepare_process

    torch.set_num_threads(CORES + 3)
    before = torch.get_num_threads()
    os.environ.pop("OMP_NUM_THREADS", None)
    if given:
        os.environ["OMP_NUM_THREADS"] = given
    size = str(local_world_size)
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update(ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    prepare_process()
    return before, torch.get_num_threads()


def test_processes_on_gpus_share_the_cores_too():
    """Under `deepspeed` each would take all of them, and offloaded optimizers be in each other's way."""
    before, now = run_emulated(threads, CORES, None)
    assert before > now == 1
    before, now = run_emulated(threads, CORES, "2")
    assert before == now > 1, "as the user has said"


def rounded() -> list[bool]:
    """Whether FP32 products are of TF32: within a block, after it, and after one that failed."""
    from inrank_megatron.distributed.platform import tensor_cores

    matmul = torch.backends.cuda.matmul
    with tensor_cores():
        seen = [matmul.allow_tf32]
    seen.append(matmul.allow_tf32)
    try:
        with tensor_cores():
            raise ValueError
    except ValueError:
        return [*seen, matmul.allow_tf32]


def test_tensor_cores_are_left_again():
    """Else all that comes after a switch in FP32 would be TF32, on a GPU alone."""
    assert run_emulated(rounded) == [True, False, False]
