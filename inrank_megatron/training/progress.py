"""The progress of a run, and how a checkpoint records it."""

import math
from dataclasses import asdict, dataclass, field

from inrank_megatron.checkpoint.folder import Checkpoint
from inrank_megatron.checkpoint.weights import is_weights_only
from inrank_megatron.training.loss_history import LossHistory


@dataclass(frozen=True)
class Progress:
    """After ``step`` steps. ``seconds``: training time so far, over all sessions of the run.

    ``validation_loss``, ``validation_tokens``: of this step, over the part of the split that all validations
    of the run have in common. ``weights_only``: no step has been made since weights alone were read.
    ``check_under_way``: the checkpoint that this was read from lacks the outcome of a rank check of its step.
    ``history``: the newest losses, and what was left out because of spikes.
    """

    step: int = 0
    seconds: float = 0.0
    validation_loss: float | None = None
    validation_tokens: int | None = None
    weights_only: bool = False
    check_under_way: bool = False
    history: LossHistory = field(default_factory=LossHistory)


def recorded_progress(progress: Progress, *, check_under_way: bool) -> dict:
    """What a checkpoint of a training at ``progress`` records of it; :func:`resume_progress` reads that."""
    loss = progress.validation_loss
    return {
        "step": progress.step,
        "seconds": progress.seconds,
        "weights_only": False,
        "validation_loss": loss if loss is not None and math.isfinite(loss) else None,
        "validation_tokens": progress.validation_tokens,
        "rank_check_under_way": check_under_way,
        "loss_history": asdict(progress.history),
    }


def resume_progress(checkpoint: Checkpoint) -> Progress:
    """Where the run stood when ``checkpoint`` was written."""
    state = checkpoint.state
    return Progress(
        step=state["step"],
        seconds=state["seconds"],
        validation_loss=state.get("validation_loss"),
        validation_tokens=state.get("validation_tokens"),
        weights_only=is_weights_only(state),
        check_under_way=state.get("rank_check_under_way", False),
        history=_history(state.get("loss_history", {})),
    )


def _history(record: dict) -> LossHistory:
    """Empty in checkpoints of versions that kept none."""
    return LossHistory(
        losses=tuple(record.get("losses", ())),
        skipped_steps=tuple(record.get("skipped_steps", ())),
        skipped_batches=record.get("skipped_batches", 0),
    )
