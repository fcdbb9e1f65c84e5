"""Checks that values which should be equal on several ranks still are, bit for bit.

Trained parameters, W0 and initial factor values are equal on the data-parallel replicas (ranks of one place
in their tensor-parallel groups); parameters that tensor parallelism does not shard, and the ranks and columns
of every layer, are equal on all ranks. A flipped bit in one memory, or a collective with two results, makes
them differ, and nothing fails: the job then trains two models that share gradients. ZeRO writes trained
parameters again from its partitioned master weights after every step. But each tensor-parallel rank has its
own master weights of unsharded parameters, and nothing ever writes W0 or initial values again.

FP32 master weights and optimizer moments are compared wherever two ranks should hold the same values: all of
them in ZeRO stage 0; in stages 1 to 3, this rank's part of the parameters that tensor parallelism does not
shard, which the other ranks of the tensor-parallel group have too. The rest of a ZeRO partition exists on one
rank only. A checksum kept next to it would not help: every step changes the values, so the checksum would be
taken of wrong values too.

Every rank reduces its tensors to three numbers on its own device. One all-gather of five numbers per rank
compares them, however large the model is. Only if they differ are the hashes of single tensors gathered, to
name the tensor and the ranks.
"""

from collections import Counter
from collections.abc import Iterator
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor

from inrank_megatron.distributed.platform import device_name
from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.fragments import read_value
from inrank_megatron.errors import UserError

# 64-bit words that are mixed at once: the caches of a CPU hold the first; on a GPU, where every chunk costs a
# dozen launches, most tensors are one chunk of the second, and 32 MiB for each intermediate are no matter.
_CHUNK, _DEVICE_CHUNK = 2**18, 2**22
# Odd numbers, so that multiplication modulo 2^64 loses no bit: of splitmix64 (Steele, Lea, Flood 2014), as
# signed integers.
_INDEX, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15

_BELOW_SIGN = 2**33 - 1


class Holders(IntEnum):
    """Which ranks should hold equal values: all ranks, data-parallel replicas, or a tensor-parallel group."""

    ALL = 0
    REPLICAS = 1
    TENSOR_PARALLEL = 2


def check_replicas(engine: Engine, *, step: int, last_good: int) -> None:
    """Compare the values that must be equal, over the whole job. Collective.

    ``last_good``: the step of the last comparison that found no difference, for the message.

    Raises:
        UserError: the same on every rank; names a tensor, and the ranks whose values differ from most others.
    """
    parallel = engine.parallel
    hashes: dict[Holders, dict[str, Tensor]] = {holders: {} for holders in Holders}
    for holders, name, tensor in held(engine):
        hashes[holders][name] = tensor_hash(tensor).to(engine.device)
    nothing = torch.zeros(1, dtype=torch.int64, device=engine.device)
    digests = [tensor_hash(torch.stack(list(h.values())) if h else nothing) for h in hashes.values()]
    places = [torch.tensor(place, device=engine.device) for place in (parallel.tp_rank, parallel.dp_rank)]
    own = torch.stack([*places, *digests])
    table = [torch.empty_like(own) for _ in range(parallel.world_size)]
    dist.all_gather(table, own)
    rows = torch.stack(table).tolist()
    groups = [(0, tp_rank, dp_rank) for tp_rank, dp_rank, *_ in rows]
    pairs = {(h, group[h], row[2 + h]) for group, row in zip(groups, rows, strict=True) for h in Holders}
    if len(pairs) == len({(h, group[h]) for group in groups for h in Holders}):
        return
    named = {name: (holders, int(h.item())) for holders in hashes for name, h in hashes[holders].items()}
    faults = differences(parallel.gather_from_all_ranks(named), groups)
    kinds = sorted(set(parallel.gather_from_all_ranks(device_name())))
    raise UserError(_message(faults, step=step, last_good=last_good, kinds=kinds))


def held(engine: Engine) -> Iterator[tuple[Holders, str, Tensor]]:
    """All that several ranks hold, by a name for messages; the order is the same on all ranks.

    Under ZeRO 3, where each replica holds a part of a parameter, they put it together, and what
    tensor-parallel ranks have in common is compared.
    """
    for name, parameter in engine.model.named_parameters():
        yield _of(parameter), name, read_value(parameter)
    for name, layer in engine.layers.items():
        numbers = (engine.ranks[name], layer.active_columns, layer.capacity)
        yield Holders.ALL, f"the rank of {name}", torch.tensor(numbers, device=engine.device)
    for name, pair in engine.initial.items():
        for leaf, value in zip(("U0", "V0"), pair, strict=True):
            yield Holders.REPLICAS, f"{name}.{leaf}", value
    yield from _optimizer_state(engine)


def _optimizer_state(engine: Engine) -> Iterator[tuple[Holders, str, Tensor]]:
    """Master weights that are not the parameters themselves, and moments."""
    master_weights = engine.master_weights
    for name, parameter in engine.parameters():
        holders = _of(parameter)
        if master_weights.shard_map.partitioned:
            if holders == Holders.REPLICAS:
                continue  # no other rank has this part
            holders = Holders.TENSOR_PARALLEL
        for key in (None, *master_weights.moments(parameter)):
            run, _ = master_weights.held(parameter, key)
            if key is not None or run.data_ptr() != parameter.data_ptr():
                yield holders, f"{key or 'the master weight'} of {name}", run


def _of(parameter: Tensor) -> Holders:
    return Holders.REPLICAS if getattr(parameter, "tensor_model_parallel", False) else Holders.ALL


@torch.no_grad()
def tensor_hash(tensor: Tensor) -> Tensor:
    """A 64-bit hash of the tensor's bits and their order, a scalar int64 on its device.

    The sum, modulo 2^64, of every 64-bit word mixed with its index; mixing loses no bit, so a change of any
    one word always shows. -0.0 and 0.0 differ, equal NaNs do not.
    """
    # A contiguous tensor of one element may still have any stride.
    data = tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    total = torch.full((), tensor.numel(), dtype=torch.int64, device=tensor.device)
    chunk = 8 * (_CHUNK if data.device.type == "cpu" else _DEVICE_CHUNK)
    for start in range(0, len(data), chunk):
        words = _words(data[start : start + chunk])
        first = start // 8 + 1
        mixed = torch.arange(first, first + len(words), device=tensor.device) * _INDEX
        mixed ^= words
        for factor in (_FIRST, _SECOND):
            mixed ^= (mixed >> 31) & _BELOW_SIGN  # torch shifts copies of the sign in
            mixed *= factor
        total += mixed.sum()
    return total


def _words(data: Tensor) -> Tensor:
    """Bytes as 64-bit words, padded with zeros; copied where they do not begin at a multiple of 8 bytes."""
    if missing := -len(data) % 8:
        data = torch.cat([data, data.new_zeros(missing)])
    elif data.storage_offset() % 8:
        data = data.clone()
    return data.view(torch.int64)


def differences(
    ranks: list[dict[str, tuple[Holders, int]]], groups: list[tuple[int, int, int]]
) -> list[tuple[str, list[int]]]:
    """``(tensor, ranks)`` for each tensor that is not the same where it must be.

    The ranks are those that hold another value than most of their replicas; where no value has a majority,
    all of these.

    Args:
        ranks: of every rank, the hash of each tensor by name, and who holds it.
        groups: of every rank, its group of each kind of :class:`Holders`.
    """
    found = []
    for name, (holders, _) in ranks[0].items():
        members: dict[int, list[int]] = {}
        for rank, group in enumerate(groups):
            members.setdefault(group[holders], []).append(rank)
        odd = [rank for same in members.values() for rank in _odd(same, [ranks[r][name][1] for r in same])]
        if odd:
            found.append((name, sorted(odd)))
    return found


def _odd(group: list[int], values: list[int]) -> list[int]:
    [(most, count), *_] = Counter(values).most_common(1)
    majority = 2 * count > len(values)
    return [rank for rank, value in zip(group, values, strict=True) if value != most or not majority]


def _message(faults: list[tuple[str, list[int]]], *, step: int, last_good: int, kinds: list[str]) -> str:
    name, ranks = faults[0]
    more = f" (and {len(faults) - 1} more tensors)" if len(faults) > 1 else ""
    who = f"rank {ranks[0]} differs" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} differ"
    what = f"{name}{more}: {who} after step {step}, and replicas must be equal bit for bit"
    last = f"The last good comparison was at step {last_good}"
    if len(kinds) > 1:
        return (
            f"{what}; devices of different kinds ({', '.join(kinds)}) can round differently. {last}: use one "
            "kind, and continue with --resume N from a checkpoint not after that step"
        )
    return (
        f"{what}; a device, its memory or a collective failed. {last}: check the machines of these ranks, "
        "and continue with --resume N from a checkpoint not after that step"
    )
