"""From a path that a user names, a run folder or one of its checkpoints, to the checkpoint that is meant."""

from pathlib import Path

from inrank_megatron.checkpoint.folder import Checkpoint, best_complete, newest_complete
from inrank_megatron.checkpoint.verify import MANIFEST
from inrank_megatron.errors import UserError

CONFIG = "config.yaml"
TOKENIZER = "tokenizer"


def locate(path: Path, *, best: bool = False) -> tuple[Path, Checkpoint, list[str]]:
    """The run folder, its newest complete checkpoint or the one that ``path`` is, and what is to be said of
    newer (or better) ones that are damaged.

    Args:
        best: of a run folder not the newest but the one with the lowest validation loss.

    Raises:
        UserError: there is no such folder, no run or no checkpoint in it, or the checkpoint is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; name the one given to --save")
    if not (path / CONFIG).is_file():
        run = path.resolve().parent.parent
        if path.parent.name != "checkpoints" and not (path / MANIFEST).is_file():
            raise UserError(
                f"{path}: not a run folder, it has no {CONFIG}; name the folder given to --save or a "
                "checkpoint in it"
            )
        if not (run / CONFIG).is_file():
            raise UserError(f"{path}: is not in a run folder, {run} has no {CONFIG}; put the checkpoint back")
        return run, Checkpoint(path), []
    folder, faults = (best_complete if best else newest_complete)(path / "checkpoints")
    if folder is None:
        reason = f"none of its checkpoints is complete: {faults[0]}" if faults else "it has no checkpoint yet"
        raise UserError(
            f"{path}: {reason}; name a run with a complete checkpoint, which --save-interval writes"
        )
    return path, Checkpoint(folder, verify=False), faults
