"""Loss and perplexity of any model over all windows of a text: the same numbers on any number of ranks."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.config.out_of_memory import or_on_the_cpu, within_memory
from inrank_megatron.distributed.device_copies import to_device
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.errors import UserError
from inrank_megatron.evaluation.windows import SlidingWindows
from inrank_megatron.interop.core.gpt import Forward


@dataclass(frozen=True)
class Score:
    """``nats``: the loss of all ``tokens`` that were scored. ``words``, ``bytes``: of the text, if known."""

    nats: float
    tokens: int
    words: int | None
    bytes: int | None

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float | None:
        return _exp(self.nats / self.words) if self.words else None

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.bytes if self.bytes else None


def total_loss(
    forward: Forward, windows: SlidingWindows, *, rows: int, parallel: Parallel, device: torch.device
) -> float:
    """Nats over all targets of ``windows``, summed in FP64. Collective; the same bits on every rank.

    The data-parallel ranks take batches of ``rows`` windows in turn. One all-reduce fills in each batch's
    sum, to which one rank has contributed, and all ranks add them in the same order.

    Raises:
        UserError: on all ranks, for a loss that is not a finite number, or where memory runs out on one.
    """
    sums = parallel.call_or_raise_on_all_ranks(
        lambda: _local_sums(forward, windows, rows, parallel.dp_group, device)
    )
    dist.all_reduce(sums, group=parallel.dp_group)
    total = sums.sum().item()
    if not math.isfinite(total):
        raise UserError(
            f"the loss on {windows.file.name} is {total}: the model's predictions are not finite; name an "
            "earlier checkpoint"
        )
    return total


@torch.inference_mode()
def _local_sums(
    forward: Forward, windows: SlidingWindows, rows: int, group: ProcessGroup, device: torch.device
) -> Tensor:
    """The sum of each batch that falls to this rank of ``group``, zero for the others."""
    count = -(-len(windows) // rows)
    sums = torch.zeros(count, dtype=torch.float64, device=device)

    def fill() -> None:
        for batch in range(group.rank(), count, group.size()):
            indices = range(batch * rows, min((batch + 1) * rows, len(windows)))
            sums[batch] = _batch_loss(forward, [windows.window(i) for i in indices], device)

    within_memory(fill, lambda: _smaller_passes(rows, windows.seq_length) + or_on_the_cpu(device))
    return sums


def _smaller_passes(rows: int, seq_length: int) -> str:
    """A pass takes memory in proportion to its tokens: activations, logits and their copies."""
    fewer = f"--micro-batch-size {rows // 2} (half of what a pass takes)" if rows > 1 else ""
    shorter = f"--seq-length {seq_length // 2} (half, with less context)" if seq_length > 1 else ""
    return f"give {', '.join(filter(None, (fewer, shorter)))}"


def _batch_loss(forward: Forward, windows: list[tuple[np.ndarray, int, int]], device: torch.device) -> Tensor:
    """Summed FP64 loss of the targets that the windows score."""
    stacked = np.stack([tokens for tokens, _, _ in windows])
    places = np.arange(stacked.shape[1] - 1)
    first, last = (np.array([[w[i]] for w in windows]) for i in (1, 2))
    # Places and not a mask, whose count the host would have to read from the device.
    scored = to_device(torch.from_numpy(np.flatnonzero((places >= first) & (places < last))), device)
    tokens = to_device(torch.from_numpy(stacked), device)
    logits = forward(tokens[:, :-1]).flatten(0, 1)[scored]
    return F.cross_entropy(logits, tokens[:, 1:].flatten()[scored], reduction="none").double().sum()


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
