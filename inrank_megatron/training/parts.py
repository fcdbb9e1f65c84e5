"""The parts of a training. ``loop.py`` runs them."""

import time
from dataclasses import dataclass, field

from inrank_megatron.config.schema import Config
from inrank_megatron.config.topology import Topology
from inrank_megatron.data.batches import EvalWindows, TrainBatches
from inrank_megatron.distributed.marks import Marks
from inrank_megatron.distributed.peak_memory import Peak, PeakMemory
from inrank_megatron.engine.engine import Engine
from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.training.micro_batches import MicroBatches
from inrank_megatron.training.progress import Progress
from inrank_megatron.training.rank_changes import RankChanges
from inrank_megatron.training.recorded_evaluation import RecordedEvaluation
from inrank_megatron.training.run_folder import RunFolder
from inrank_megatron.training.run_logger import RunLogger
from inrank_megatron.training.saving import Saver
from inrank_megatron.training.step_metrics import StepMetrics
from inrank_megatron.training.stopping import StopRequest
from inrank_megatron.training.watching import StepWatch

OVERLAP = "overlap_rank_check"


@dataclass
class TrainingParts:
    """Everything that the training loop (``Trainer``) needs.

    Attributes:
        windows: the texts to evaluate, by split (``valid``, ``test``); a split without text is absent.
        identity: what every checkpoint records of the run, as JSON: data, switch step, whether rank checks
            overlap with steps and, after the switch, the columns of each layer before it.
        peak_flops: peak FLOP/s of one device, for the utilisation; None if unknown.
        peak_memory: the largest on any rank, by part of the run; empty until the training has ended.
    """

    config: Config
    topology: Topology
    engine: Engine
    method: Method
    batches: TrainBatches
    windows: dict[str, EvalWindows]
    folder: RunFolder
    run_logger: RunLogger
    stop: StopRequest
    marks: Marks
    identity: dict
    peak_flops: float | None
    progress: Progress = field(default_factory=Progress)
    peak_memory: dict[str, Peak] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config, topology, engine, run_logger = self.config, self.topology, self.engine, self.run_logger
        parallel, device = engine.parallel, engine.device
        self._began, self._earlier = time.monotonic(), self.progress.seconds
        self._saved = self.progress  # of the newest checkpoint; step 0 needs none
        self._compared_step = self.progress.step  # full tensors were loaded, or drawn on all ranks alike
        self._memory = memory = PeakMemory(device, "start")
        self._micro_batches = MicroBatches(
            self.batches,
            topology,
            parallel,
            device,
            self.marks,
            skipped=self.progress.history.skipped_batches,
        )
        self._rank_changes = RankChanges(
            engine,
            self.method,
            batches=self._micro_batches,
            overlap=self.identity.get(OVERLAP, False),  # not in runs that began before that was possible
            run_logger=run_logger,
            memory=memory,
            marks=self.marks,
        )
        self._metrics = StepMetrics(engine, config, topology, run_logger, memory, self.peak_flops)
        self._step_watch = StepWatch(config, parallel, run_logger)
        self._evaluation = RecordedEvaluation(
            engine, self.windows, config, topology, run_logger, self.marks, self._seconds, self._stopping
        )
        self._saver = Saver(
            self.folder.checkpoints,
            parallel=parallel,
            device=device,
            run_logger=run_logger,
            keep_last=config.training.keep_last,
            verified=self.folder.checkpoint,
            leaders=self.folder.leaders,
        )

    def _stopping(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all ranks.

        Raises:
            UserError: on all ranks, if the checkpoint in progress could not be written.
        """
        return self._saver.any_rank_stops(self.stop.reason() is not None)

    def _seconds(self) -> float:
        """Training time over all sessions."""
        return self._earlier + time.monotonic() - self._began
