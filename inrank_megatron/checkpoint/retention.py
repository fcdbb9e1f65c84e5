"""Which checkpoints of a run stay, and what a killed process left of those that did not."""

import shutil
from collections.abc import Collection, Iterable
from functools import partial
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
from inrank_megatron.checkpoint.index import Examine, examine
from inrank_megatron.checkpoint.verify import Damaged
from inrank_megatron.errors import UserError

REMOVED = ".removed"


def prune(
    root: Path, *, keep_last: int, newest: Path, verified: set[Path], examine: Examine = examine
) -> None:
    """Remove checkpoints before ``newest`` beyond the ``keep_last`` last complete ones and the best complete
    one.

    ``newest`` has just been published. Nothing is removed before it and all that count as kept have been read
    back and found complete. Later ones, from before the run went back to an earlier step, are not touched.

    Args:
        verified: complete ones that need not be read once more; those found here are added.
        examine: see :class:`Checkpoint`.

    Raises:
        Damaged: ``newest`` is not complete; all others are still there.
        OSError: one cannot be removed.
    """
    so_far = [folder for folder in published(root) if step_of(folder) <= step_of(newest)]
    course = [folder for folder in so_far if not is_set_aside(folder)]
    last, judged = {newest, *course[:keep_last]}, by_loss(root)
    if all(folder in last or folder in judged[:1] or folder.is_symlink() for folder in so_far):
        return
    Checkpoint(newest, examine=examine)
    verified.add(newest)
    complete = partial(_first_complete, verified=verified, examine=examine)
    kept = {*last, *complete(course, keep_last), *complete(judged, 1)}
    for folder in so_far:
        if folder not in kept:
            _remove(folder)


def keep_only(root: Path, names: Collection[str]) -> None:
    """Remove all checkpoints but these, as another host has that keeps the run's records.

    Raises:
        OSError: one cannot be removed.
    """
    for folder in published(root):
        if folder.name not in names:
            _remove(folder)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        return
    # A folder that is half removed must not look like a checkpoint.
    hidden = folder.with_name(f".{folder.name}{REMOVED}")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _first_complete(
    folders: Iterable[Path], count: int, *, verified: set[Path], examine: Examine
) -> list[Path]:
    """The first ``count`` complete ones, and what comes before them and may be complete but cannot be
    read.
    """
    found: list[Path] = []
    unread: list[Path] = []
    for folder in folders:
        if len(found) == count:
            break
        try:
            if folder not in verified:
                Checkpoint(folder, examine=examine)
                verified.add(folder)
            found.append(folder)
        except Damaged:
            continue
        except UserError:
            unread.append(folder)
    return found + unread


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
