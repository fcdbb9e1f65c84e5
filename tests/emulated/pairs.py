"""One step each of trainings next to the complete ones; a top-level function that ``run_emulated`` calls.

Nothing changes in them: growth, switch, restart, saving and resuming are those of the complete trainings.
"""

import tempfile
import traceback
from pathlib import Path

from inrank_megatron.engine.deepspeed_setup import stop_deepspeed
from tests.contract.layouts import LAYOUTS
from tests.emulated.device import rank_of
from tests.emulated.trainings import configured, trainer_of

LAST_CHARACTERS = 300
Row = tuple[str, str, dict]


def faults(rows: list[Row]) -> dict[str, str]:
    """By row: the end of what its step raised, or the products that leave their tiles."""
    found = {}
    for row in rows:
        try:
            problem = _step(*row)
        except Exception:
            problem = traceback.format_exc()[-LAST_CHARACTERS:]
        if problem:
            found[str(row)] = problem
    return found


def _step(method: str, layout_name: str, settings: dict) -> str:
    layout = LAYOUTS[layout_name]
    world = rank_of(layout.world_size - 1, layout.world_size, layout.tensor_parallel)
    with world as (parallel, log), tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(configured(method, layout, settings), parallel, Path(folder))
        log.phase = "step"
        trainer.engine.train_step(trainer._micro_batches(0), step=1, lr=1e-3)
        stop_deepspeed(trainer.engine.deepspeed)
        assert log.collectives["step"] or layout.world_size == 1
        return "; ".join(log.misaligned.get("step", []))
