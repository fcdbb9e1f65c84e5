"""When a method leaves its first phase."""

from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.settings import Run

SWITCHING = ("inrank-efficient", "warm-start")
"""The methods that leave it at all."""


def switch_step(config: Run, steps_per_epoch: int) -> int | None:
    """Optimizer steps of the first phase (Algorithm 3); None for a method that never switches, or that does
    so when its ranks stand still (`switch_patience`).

    `switch_iters` counts steps, `switch_epochs` counts epochs of `steps_per_epoch` optimizer steps. With
    neither it is the paper's one epoch, but at most half of the run, so that a short run shows both phases.

    Raises:
        UserError: a switch that would come at or after the end of the run.
    """
    inrank, last = config.inrank, config.training.train_iters - 1
    method = config.training.method
    patient = method == "inrank-efficient" and inrank.switch_patience is not None
    if method not in SWITCHING or patient:
        return None
    if inrank.switch_iters is not None:
        step, shown = inrank.switch_iters, f"switch_iters = {inrank.switch_iters}"
    elif inrank.switch_epochs is not None:
        step = max(1, round(inrank.switch_epochs * steps_per_epoch))
        shown = f"switch_epochs = {inrank.switch_epochs:g} ({step} steps at {steps_per_epoch} an epoch)"
    else:
        step, shown = max(1, min(steps_per_epoch, config.training.train_iters // 2)), "train_iters = 1"
    if step > last:
        raise UserError(
            f"{shown}: the switch must come before the last of {last + 1} steps; "
            f"raise train_iters, lower switch_iters, or give --method "
            f"{'dense' if method == 'warm-start' else 'inrank'}"
        )
    return step
