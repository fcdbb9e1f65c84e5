"""Hashes of tensors: any change of value or order shows; layout in memory does not."""

import pytest
import torch

from inrank_megatron.engine.replicas import Holders, differences, tensor_hash

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]


def values(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0)).mul(100).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 64, 2**19 + 5])
def test_hash_does_not_depend_on_memory_layout(count, dtype):
    tensor = values(count, dtype)
    shifted = torch.cat([tensor[:1], tensor])[1:]
    strided = torch.stack([tensor, tensor], dim=1)[:, 0]
    assert tensor_hash(tensor) == tensor_hash(shifted) == tensor_hash(strided)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hash_depends_on_every_bit(dtype):
    tensor = values(9, dtype)
    data = tensor.view(torch.uint8)
    seen = {tensor_hash(tensor).item()}
    for byte in range(len(data)):
        for bit in range(8):
            data[byte] ^= 1 << bit
            seen.add(tensor_hash(tensor).item())
            data[byte] ^= 1 << bit
    assert len(seen) == 8 * len(data) + 1


def test_hash_depends_on_order_and_sign():
    tensor = values(2**19, torch.float32)
    swapped, negated = tensor.clone(), -tensor
    swapped[[3, 2**18 + 1]] = swapped[[2**18 + 1, 3]]
    found = [tensor_hash(t).item() for t in (tensor, swapped, negated, tensor.flip(0), tensor[:-1])]
    assert len(set(found)) == len(found)


def test_words_that_differ_never_collide():
    """Mixing is one-to-one: of a word and of those that differ from it in the sign and one more bit."""
    words = [torch.tensor([0])]
    words += [torch.tensor([(1 << bit) - 2**63]) for bit in range(63)]
    words += [torch.tensor([~word.item()]) for word in words]
    assert len({tensor_hash(word).item() for word in words}) == len(words)


def test_differing_ranks_are_named():
    """Replicas of a sharded tensor are the ranks of one place; of a common one, all ranks; of a part that
    ZeRO gives to a tensor-parallel group, the ranks of that.
    """
    common, shard, part = Holders.ALL, Holders.REPLICAS, Holders.TENSOR_PARALLEL
    groups = [(0, rank % 2, rank // 2) for rank in range(6)]
    ranks = [{"norm": (common, 1), "shard": (shard, 10 + tp), "part": (part, dp)} for _, tp, dp in groups]
    assert differences(ranks, groups) == []
    ranks[3] = {"norm": (common, 2), "shard": (shard, 99), "part": (part, 7)}
    assert differences(ranks, groups) == [("norm", [3]), ("shard", [3]), ("part", [2, 3])]
    ranks[1] = {"norm": (common, 1), "shard": (shard, 98), "part": (part, 0)}
    assert differences(ranks, groups)[1] == ("shard", [1, 3, 5]), "no majority: all three"
