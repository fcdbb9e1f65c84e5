"""Exact perplexity over a split, the same on any number of ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from inrank_megatron.data.batches import EvalWindows
from inrank_megatron.distributed.device_copies import to_device
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.engine import Engine

# The answer is read from the device, which then has nothing to do until the host has sent the next pass.
PASSES_BETWEEN_QUESTIONS = 8


@dataclass(frozen=True)
class Evaluation:
    """``loss``: mean nats per token over ``tokens`` targets. ``word_perplexity``: None without words.
    ``part``: the same over the first windows alone, if that was asked for.
    """

    loss: float
    tokens: int
    word_perplexity: float | None
    part: "Evaluation | None" = None

    @property
    def perplexity(self) -> float:
        return _exp(self.loss)


@torch.no_grad()
def evaluate(
    engine: Engine,
    windows: EvalWindows,
    *,
    rows: int,
    limit: int,
    part: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Mean token loss over ``windows``, summed in FP64.

    Windows do not overlap and each token but the first is scored once; data-parallel ranks take them in turn.

    Args:
        rows: windows of one forward pass.
        limit: score the first ``limit`` windows; word perplexity needs all of them.
        part: give the result of the first ``part`` windows too; they fill whole passes of all ranks.
        stop: asked on every rank before each pass, on a GPU before every eighth, with the same answer on all;
            True ends the evaluation.

    Returns:
        The result, on every rank; None if ``stop`` ended it.
    """
    parallel, device = engine.parallel, engine.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    sums_of_part, passes = None, 1 if device.type == "cpu" else PASSES_BETWEEN_QUESTIONS
    engine.model.eval()
    try:
        for index, start in enumerate(range(0, limit, rows * parallel.dp_size)):
            if index % passes == 0 and stop():
                return None
            if start == part:
                sums_of_part = sums.clone()
            own = range(start + parallel.dp_rank * rows, min(start + (parallel.dp_rank + 1) * rows, limit))
            # A rank without a window of its own computes one and scores none of it: under ZeRO 3 the others
            # gather parameters from it in their pass.
            losses = _losses(engine, [windows.window(i) for i in own] or [(windows.window(start)[0], 0)])
            sums[0] += losses.sum()
            sums[1] += len(losses)
    finally:
        engine.model.train()
    first = None if sums_of_part is None else Evaluation(*_mean(sums_of_part, parallel), None)
    loss, count = _mean(sums, parallel)
    words = windows.file.num_words if limit == len(windows) else None
    return Evaluation(loss, count, _exp(sums[0].item() / words) if words else None, first)


def _losses(engine: Engine, batch: list[tuple[np.ndarray, int]]) -> torch.Tensor:
    """FP64 losses of the scored tokens: of each window's tokens [S + 1] the first so many targets count."""
    tokens = to_device(torch.from_numpy(np.stack([t for t, _ in batch])), engine.device)
    losses = engine.token_losses(engine.model, (tokens[:, :-1], tokens[:, 1:])).double()
    # Places and not a mask, whose count the host would have to read.
    scored = np.arange(losses.shape[1]) < np.array([[v] for _, v in batch])
    places = to_device(torch.from_numpy(np.flatnonzero(scored)), engine.device)
    return losses.flatten()[places]


def _mean(sums: torch.Tensor, parallel: Parallel) -> tuple[float, int]:
    """Loss and tokens from this rank's ``sums``, which become those of all ranks."""
    dist.all_reduce(sums, group=parallel.dp_group)
    return (sums[0] / sums[1]).item(), int(sums[1].item())


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
