"""The main program, which pauses at one moment of its work so that a test can end it there.

``PAUSE`` names the moment, its number in the session, and seconds; when it comes, the file ``PHASE_FILE`` is
written, and the program waits there for so long. Launched by test_run_kills.
"""

import os
import runpy
import time
from pathlib import Path

from inrank_megatron.distributed.platform import prepare_process

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain_gpt2.py"
PAUSE, PHASE_FILE = "TEST_PAUSE", "TEST_PHASE_FILE"
_met: dict[str, int] = {}


def is_now(phase: str) -> bool:
    """Whether it is the one; asked each time that it comes."""
    _met[phase] = _met.get(phase, 0) + 1
    return os.environ.get(PAUSE, "").rpartition("/")[0] == f"{phase}/{_met[phase]}"


def pause() -> None:
    Path(os.environ[PHASE_FILE]).touch()
    time.sleep(float(os.environ[PAUSE].rpartition("/")[2]))


def at(phase: str) -> None:
    if is_now(phase):
        pause()


def before(owner, name: str, phase) -> None:
    """Have ``owner.name`` pause first. ``phase``: its name, or what gives it from the arguments."""
    function = getattr(owner, name)

    def pausing(*args, **options):
        found = phase if isinstance(phase, str) else phase(*args)
        if found:
            at(found)
        return function(*args, **options)

    setattr(owner, name, pausing)


def half_written(save_file):
    """A save of tensors during which half of the file is there for a while."""

    def pausing(tensors, path):
        save_file(tensors, path)
        if is_now("inside a tensor file"):
            content = path.read_bytes()
            os.truncate(path, len(content) // 2)
            pause()
            path.write_bytes(content)

    return pausing


def after_rename(rename):
    def pausing(path, target):
        result = rename(path, target)
        for ending, phase in ((".replaced", "between the renames"), (".removed", "a removal")):
            if str(target).endswith(ending):
                at(phase)
        if path.name.endswith(".partial"):
            at("published, not on record")
        return result

    return pausing


def plant() -> None:
    # Imported here: it imports Megatron-Core and DeepSpeed, for which the process must be prepared.
    from inrank_megatron.checkpoint import writing
    from inrank_megatron.engine import changes
    from inrank_megatron.engine.engine import Engine
    from inrank_megatron.training import recorded_evaluation

    before(Engine, "train_step", "a step")
    before(changes, "set_rank", "growth")
    before(changes, "refactor", "the switch")
    before(recorded_evaluation, "evaluate", "an evaluation")
    before(
        writing.PartWriter,
        "add",
        lambda _, piece: piece.name.endswith("position_embeddings.weight") and "the copy",
    )
    writing.save_file = half_written(writing.save_file)
    before(writing, "save_file", "the tensors")
    before(writing, "_write", lambda path, content: f"the {path.stem}")
    before(writing, "sync", lambda path: path.name.endswith(".partial") and "the flush")
    Path.rename = after_rename(Path.rename)


if __name__ == "__main__":
    prepare_process()
    plant()
    runpy.run_path(str(PRETRAIN), run_name="__main__")
