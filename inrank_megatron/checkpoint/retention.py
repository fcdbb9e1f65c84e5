"""Which checkpoints of a run stay, and what a killed process left of those that did not."""

import shutil
from pathlib import Path

from inrank_megatron.checkpoint.folder import (
    PARTIAL,
    PREFIX,
    REPLACED,
    SET_ASIDE,
    Checkpoint,
    by_loss,
    is_set_aside,
    published,
    step_of,
)

REMOVED = ".removed"


def prune(root: Path, *, keep_last: int, newest: Path) -> None:
    """Remove checkpoints before ``newest`` beyond the ``keep_last`` last, but not the best of all.

    ``newest`` has just been published. Nothing is removed before it has been read back and found whole. Later
    ones, from before the run went back to an earlier step, are not touched.

    Raises:
        Damaged: ``newest`` is not whole; all others are still there.
        OSError: one cannot be removed.
    """
    so_far = [folder for folder in published(root) if step_of(folder) <= step_of(newest)]
    course = [folder for folder in so_far if not is_set_aside(folder)]
    kept = {newest, *course[:keep_last], *by_loss(root)[:1]}
    old = [folder for folder in so_far if folder not in kept and not folder.is_symlink()]
    if old:
        Checkpoint(newest)
    for folder in old:
        # A folder that is half removed must not look like a checkpoint.
        hidden = folder.with_name(f".{folder.name}{REMOVED}")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden)


def go_back(root: Path, step: int) -> None:
    """Set all checkpoints after ``step`` aside, for good until one is chosen by its step or written again: of
    what the run does from there on they are no part.
    """
    for folder in published(root):
        if step_of(folder) > step:
            (folder / SET_ASIDE).touch()
        elif step_of(folder) == step:
            (folder / SET_ASIDE).unlink(missing_ok=True)


def tidy(root: Path) -> None:
    """Remove what a killed writer left behind; only the one process that may write calls it."""
    for path in root.glob(f".{PREFIX}*{REPLACED}"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(REPLACED))
        if final.exists():
            shutil.rmtree(path)
        else:
            # Killed between the two renames: the older checkpoint of the step is still good.
            path.rename(final)
    for ending in (PARTIAL, REMOVED):
        for path in root.glob(f".{PREFIX}*{ending}"):
            shutil.rmtree(path)
