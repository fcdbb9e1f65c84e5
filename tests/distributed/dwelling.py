"""The main program, which dwells at one moment of its work so that a test can end it there.

``DWELL`` names the moment and the how-manieth it is; when it comes, the file ``PHASE_FILE`` is written, and
the program waits there for some seconds. Launched by test_run_kills.
"""

import os
import runpy
import time
from pathlib import Path

from inrank_megatron.platform import prepare_process

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain_gpt2.py"
DWELL, PHASE_FILE = "TEST_DWELL", "TEST_PHASE_FILE"
SECONDS = 2.0
TENSOR = "embedding.position_embeddings.weight"  # neither the first of a checkpoint nor the last
_met: dict[str, int] = {}


def at(phase: str) -> None:
    """Dwell if it is the one."""
    wanted, _, time_of_it = os.environ.get(DWELL, "").partition("/")
    _met[phase] = _met.get(phase, 0) + 1
    if phase == wanted and _met[phase] == int(time_of_it):
        Path(os.environ[PHASE_FILE]).write_text(phase)
        time.sleep(SECONDS)


def before(owner, name: str, phase) -> None:
    """Have ``owner.name`` dwell first. ``phase``: its name, or what gives it from the arguments."""
    function = getattr(owner, name)

    def dwelling(*args, **options):
        found = phase if isinstance(phase, str) else phase(*args)
        if found:
            at(found)
        return function(*args, **options)

    setattr(owner, name, dwelling)


def after_rename(rename):
    def dwelling(path, target):
        result = rename(path, target)
        for ending, phase in ((".replaced", "between the renames"), (".removed", "a removal")):
            if str(target).endswith(ending):
                at(phase)
        if path.name.endswith(".partial"):
            at("published, not on record")
        return result

    return dwelling


def plant() -> None:
    # Imported here: it imports Megatron-Core and DeepSpeed, for which the process must be prepared.
    from inrank_megatron.checkpoint import folder
    from inrank_megatron.engine.engine import Engine
    from inrank_megatron.training import loop

    before(Engine, "train_step", "a step")
    before(Engine, "_set_rank", "growth")
    before(Engine, "_refactor", "the switch")
    before(loop, "evaluate", "an evaluation")
    before(
        folder.CheckpointWriter,
        "add",
        lambda _, name, tensor: name.endswith("position_embeddings.weight") and "the copy",
    )
    before(folder, "save_file", "the tensors")
    before(folder, "_write_json", lambda path, value: f"the {path.stem}")
    before(folder, "sync", lambda path: path.name.endswith(".partial") and "the flush")
    Path.rename = after_rename(Path.rename)


if __name__ == "__main__":
    prepare_process()
    plant()
    runpy.run_path(str(PRETRAIN), run_name="__main__")
