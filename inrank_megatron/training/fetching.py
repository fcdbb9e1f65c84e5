"""Portions of a checkpoint that are on another host, sent by a rank there."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from inrank_megatron.checkpoint.folder import Checkpoint
from inrank_megatron.checkpoint.index import Portion, portions_of, read_portion
from inrank_megatron.checkpoint.slices import Box
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.distributed.side_group import PATIENCE
from inrank_megatron.training.examining import Leaders


class _Wanted(NamedTuple):
    portion: Portion
    dtype: torch.dtype


def fetch(
    checkpoint: Checkpoint,
    boxes: Iterable[tuple[str, Box]],
    *,
    leaders: Leaders,
    holders: Mapping[str, list[int]],
    parallel: Parallel,
) -> None:
    """Receive what of ``boxes`` is in no file on this host, into ``checkpoint.received``. Collective.

    Args:
        boxes: names and places of what this rank is going to read.
        holders: of each file, one rank of each host that has it (``JobExaminer``).

    Raises:
        UserError: on all ranks; a file cannot be read.
    """
    rank = parallel.rank
    wanted: dict[int, dict[_Wanted, None]] = {}
    for name, box in boxes:
        entry = checkpoint.entry(name)
        for portion in portions_of(entry, box):
            ranks = holders[portion.piece.file]
            if leaders[rank] not in {leaders[holder] for holder in ranks}:
                wanted.setdefault(ranks[0], {})[_Wanted(portion, entry.dtype)] = None
    asked = parallel.gather_from_all_ranks({holder: list(items) for holder, items in wanted.items()})
    own = {item for wishes in asked for item in wishes.get(rank, [])}
    values = parallel.call_or_raise_on_all_ranks(
        lambda: {item: read_portion(checkpoint.folder, *item) for item in own}
    )
    checkpoint.received = _exchange(asked, values, rank)


def _exchange(
    asked: list[dict[int, list[_Wanted]]], values: Mapping[_Wanted, Tensor], rank: int
) -> dict[Portion, Tensor]:
    """One pair of ranks after the other, in the same order on all, so that no two wait for each other."""
    received: dict[Portion, Tensor] = {}
    group = dist.new_group(backend="gloo", timeout=PATIENCE)  # the values are on the CPU
    for receiver, wishes in enumerate(asked):
        for sender, items in sorted(wishes.items()):
            for item in items if rank in (sender, receiver) else ():
                if rank == sender:
                    dist.send(_bytes(values[item]), receiver, group=group)
                else:
                    received[item.portion] = torch.empty(item.portion.box[1], dtype=item.dtype)
                    dist.recv(_bytes(received[item.portion]), sender, group=group)
    dist.destroy_process_group(group)
    return received


def _bytes(values: Tensor) -> Tensor:
    return values.view(-1).view(torch.uint8)
