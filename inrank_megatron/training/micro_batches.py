"""This rank's micro-batches on the device, those of the next step ahead of time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from inrank_megatron.config.topology import Topology
from inrank_megatron.data.batches import TrainBatches
from inrank_megatron.distributed.device_copies import to_device
from inrank_megatron.distributed.marks import Marks
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.live_model import MicroBatch


class MicroBatches:
    """``micro_batches(step)``: this rank's part of the global batch of ``step`` (from 0).

    Args:
        marks: counts what is taken.
        skipped: global batches that are passed over: step s has the batch of index s + ``skipped``.
    """

    def __init__(
        self,
        batches: TrainBatches,
        topology: Topology,
        parallel: Parallel,
        device: torch.device,
        marks: Marks,
        *,
        skipped: int = 0,
    ):
        self._batches, self._topology, self._skipped = batches, topology, skipped
        self._marks = marks
        self._parallel, self._device = parallel, device
        self._ahead: tuple[int, list[Tensor]] = (-1, [])

    def __call__(self, step: int) -> Iterator[MicroBatch]:
        """Inputs and targets [B, S], int64, of each micro-batch."""
        known, rows = self._ahead
        if known != step:
            rows = self._rows(step)
        for tokens in rows:
            self._marks.micro_batches += 1
            yield tokens[:, :-1], tokens[:, 1:]

    def fetch(self, step: int) -> None:
        """Send the tokens of ``step`` on their way to the device; the host does not wait."""
        self._ahead = (step, self._rows(step))

    def _rows(self, step: int) -> list[Tensor]:
        parallel, micro = self._parallel, self._topology.micro_batch_size
        rows = []
        for index in range(self._topology.accumulation_steps):
            first = (index * parallel.dp_size + parallel.dp_rank) * micro
            tokens = torch.from_numpy(self._batches.rows(step + self._skipped, first, first + micro))
            rows.append(to_device(tokens, self._device))
        return rows
