"""Stock Megatron-Core and DeepSpeed train without CUDA. That their ranks print nothing of their own, under
either launcher: `test_run_resume.py`.
"""

import pytest
import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from inrank_megatron.distributed.process_groups import initialise
from tests.distributed.minimal_engine import train
from tests.harness import run_ranks


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("tensor_model_parallel_size", [1, 2])
def test_loss_falls_with_dropout_under_zero_1(tensor_model_parallel_size, bf16):
    first, second = run_ranks(train, 2, tensor_model_parallel_size, bf16)
    assert first[-1] < first[0]
    if tensor_model_parallel_size == 2:
        assert first == second


def test_tensor_parallel_ranks_have_their_own_random_streams():
    """Without the patches nothing raises here, but every stream is the same."""
    first, second = run_ranks(_draw_from_streams, 2)
    assert not torch.equal(first["sharded"], second["sharded"])
    assert torch.equal(first["replicated"], second["replicated"])
    assert not torch.equal(first["sharded"], first["sharded_again"])
    assert first["replicated_undisturbed"] and second["replicated_undisturbed"]


def test_recomputation_repeats_the_dropout_mask():
    """Megatron's streams and the CPU's generator, which the patches make one, go back together."""
    assert all(run_ranks(_masks_agree, 2))


def _draw_from_streams(rank: int, world_size: int) -> dict:
    initialise(backend="gloo", tensor_model_parallel_size=world_size)
    model_parallel_cuda_manual_seed(1234)
    expected = torch.rand(8, generator=_copy_of_default_generator())
    with get_cuda_rng_tracker().fork():
        sharded = torch.rand(8)
    replicated = torch.rand(8)
    with get_cuda_rng_tracker().fork():
        sharded_again = torch.rand(8)
    return {
        "sharded": sharded,
        "sharded_again": sharded_again,
        "replicated": replicated,
        "replicated_undisturbed": torch.equal(replicated, expected),
    }


def _copy_of_default_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(torch.default_generator.get_state())
    return generator


def _masks_agree(rank: int, world_size: int) -> bool:
    initialise(backend="gloo", tensor_model_parallel_size=world_size)
    model_parallel_cuda_manual_seed(1234)
    x = torch.ones(1000, requires_grad=True)

    def drop(value: torch.Tensor) -> torch.Tensor:
        with get_cuda_rng_tracker().fork():
            return torch.nn.functional.dropout(value, 0.5)

    y = checkpoint(drop, False, x)
    y.sum().backward()
    return torch.equal(y.detach(), x.grad)
