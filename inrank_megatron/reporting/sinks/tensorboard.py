"""TensorBoard event files in the run folder, always written."""

import threading
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Args: ``resume_step``: completed steps that the run continues from; None for a new run."""

    def __init__(self, run_dir: Path, *, resume_step: int | None):
        # TensorBoard hides earlier events from purge_step on.
        purge_step = resume_step + 1 if resume_step else resume_step
        self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step, flush_secs=10)
        threading.excepthook = _without_tensorboard

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._events.add_scalar(tag, value, step)

    def close(self, *, finished: bool = False) -> None:
        self._events.close()


def _without_tensorboard(fault: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread keeps a fault for the next record to raise, which becomes an error in one line."""
    if not type(fault.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(fault)
