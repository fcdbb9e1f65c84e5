"""Evaluations of a run's splits, each recorded once."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from inrank_megatron.config.schema import Config
from inrank_megatron.config.topology import Topology
from inrank_megatron.data.batches import EvalWindows
from inrank_megatron.distributed.marks import Marks
from inrank_megatron.engine.engine import Engine
from inrank_megatron.training.evaluate import evaluate
from inrank_megatron.training.progress import Progress
from inrank_megatron.training.run_logger import RunLogger


@dataclass(frozen=True)
class RecordedEvaluation:
    """Called on all ranks alike.

    Attributes:
        windows: what to evaluate on, by split (``valid``, ``test``); a split without text is absent.
        seconds: training time over all sessions until now.
        stopping: whether any rank was asked to stop, the same answer on all ranks; it ends an evaluation.
    """

    engine: Engine
    windows: dict[str, EvalWindows]
    config: Config
    topology: Topology
    run_logger: RunLogger
    marks: Marks
    seconds: Callable[[], float]
    stopping: Callable[[], bool]

    def evaluate(self, split: str, progress: Progress) -> Progress | None:
        """Evaluate and record, unless an earlier session has; a split without text is done at once.

        Returns:
            ``progress`` with what the evaluation adds to it; None if a stop ended the evaluation.
        """
        training, step = self.config.training, progress.step
        windows, run_logger = self.windows.get(split), self.run_logger
        if windows is None:
            return progress
        usual = limit = len(windows)
        if training.eval_iters is not None and split == "valid":
            usual = min(usual, training.eval_iters * self.topology.global_batch_size)
            limit = usual if step < training.train_iters else limit
        tokens = min(limit * windows.seq_length, windows.num_targets)
        recorded = self.engine.parallel.broadcast_from_rank_0(
            lambda: run_logger.recorded_evaluation(step, split, tokens=tokens)
        )
        rows = self.topology.micro_batch_size
        if recorded is None:
            self.marks.begin("evaluation", step)
        result = recorded or evaluate(
            self.engine, windows, rows=rows, limit=limit, part=usual, stop=self.stopping
        )
        if result is None:
            return None
        if recorded is None:
            progress = replace(progress, seconds=self.seconds())
            run_logger.evaluation(step, split, result, elapsed_seconds=progress.seconds)
        if split != "valid":
            return progress
        common = result.part or result
        return replace(progress, validation_loss=common.loss, validation_tokens=common.tokens)
