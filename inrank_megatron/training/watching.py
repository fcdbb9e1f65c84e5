"""What is noticed of a training step, from what all ranks know alike: a slow rank, a loss that jumps."""

import math
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from inrank_megatron.config.schema import Config
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.engine import StepResult
from inrank_megatron.errors import UserError
from inrank_megatron.training.loss_history import FACTOR, LossHistory
from inrank_megatron.training.rank_log import LOG
from inrank_megatron.training.run_logger import RunLogger
from inrank_megatron.training.stragglers import INTERVAL, Stragglers

MOST_ROLLBACKS = 3


@dataclass
class RolledBack(Exception):
    """Raised on all ranks: the run is to go on from ``checkpoint``, with batches that come after the spike at
    ``step``. ``skipped_batches``: what that passes over, with what earlier rollbacks did.
    """

    checkpoint: Path
    step: int
    skipped_batches: int


class Rollbacks:
    """Counts them: a run that jumps after the same checkpoint again and again needs another remedy."""

    def __init__(self) -> None:
        self._of: Counter[Path] = Counter()

    def note(self, rolled_back: RolledBack) -> str:
        """What the run's records say of one.

        Raises:
            UserError: there were too many to that checkpoint.
        """
        checkpoint, step = rolled_back.checkpoint, rolled_back.step
        self._of[checkpoint] += 1
        if self._of[checkpoint] > MOST_ROLLBACKS:
            raise UserError(
                f"step {step}: the loss has jumped after {checkpoint.name} {self._of[checkpoint]} times, on "
                "other batches each time; lower --lr or --clip-grad and continue with --resume auto"
            )
        return (
            f"rolled back from the loss spike of step {step} to {checkpoint.name}; batches passed over so "
            f"far: {rolled_back.skipped_batches}"
        )


class StepWatch:
    """Looks at every step's result. Made, and its methods called, on all ranks alike."""

    def __init__(self, config: Config, parallel: Parallel, run_logger: RunLogger):
        self._action = config.training.on_loss_spike
        self._interval = max(INTERVAL, config.training.log_interval)
        self._run_logger, self._rank, self._several = run_logger, parallel.rank, parallel.world_size > 1
        self._stragglers = Stragglers(parallel.gather_from_all_ranks(socket.gethostname()))

    def asks_times(self, step: int) -> bool:
        """Whether the ranks' times are to come with the result of ``step``."""
        return self._several and step % self._interval == 0

    def forbids(self, history: LossHistory) -> Callable[[float], bool]:
        """Whether a step with that loss is to be left out, after ``history``."""
        return history.is_spike if self._action == "skip" else lambda loss: False

    def look(self, result: StepResult, history: LossHistory, *, step: int) -> LossHistory:
        """Report what is noticeable of ``step``; ``history`` with its loss."""
        if result.rank_seconds:
            self._look_at_times(result, step)
        if not math.isfinite(result.loss):  # of a step that overflowed
            return history
        if (limit := history.limit()) is not None and result.loss > limit:
            ending = "; the update is left out" if result.forbidden else ""
            text = (
                f"step {step}: the loss jumps to {result.loss:.4f}, beyond {limit:.4f} = median of the last "
                f"{len(history.losses)} + {FACTOR:g} deviations{ending}"
            )
            self._run_logger.notice(
                "loss_spike", step, text, loss=result.loss, limit=limit, skipped=result.forbidden
            )
        return history.after(step, result.loss, skipped=result.forbidden)

    def rolls_back(self, loss: float, history: LossHistory) -> bool:
        """Whether a step with that loss, after ``history``, is to be undone."""
        return self._action == "rollback" and history.is_spike(loss)

    def figures(self) -> dict[str, float | int]:
        """For the record of a step: the slowest straggler, if there is one."""
        if not self._stragglers.known:
            return {}
        worst = max(self._stragglers.known.values(), key=lambda known: known.factor)
        return {"straggler_rank": worst.rank, "straggler_factor": worst.factor}

    def _look_at_times(self, result: StepResult, step: int) -> None:
        own = 1000 * result.rank_seconds[self._rank]
        LOG.info("step %d: loss %.4f, %.1f ms of own work per step", step, result.loss, own)
        new, over = self._stragglers.add(result.rank_seconds, self._interval)
        for straggler in new:
            text = f"step {step}: {straggler}"
            values = {"rank": straggler.rank, "host": straggler.host, "factor": straggler.factor}
            self._run_logger.notice("straggler", step, text, seconds=straggler.seconds, **values)
        for rank in over:
            text = f"step {step}: rank {rank} keeps up with the others again"
            self._run_logger.notice("straggler", step, text, rank=rank, factor=1.0)
