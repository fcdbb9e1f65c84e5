"""Whether a folder that is not a run yet may become one: what is there already stays what it is."""

import errno
import os
from pathlib import Path

from inrank_megatron.checkpoint.locate import CONFIG, TOKENIZER
from inrank_megatron.errors import UserError
from inrank_megatron.reporting.files import METRICS, RANKS, SAMPLE
from inrank_megatron.training.rank_log import LOGS
from inrank_megatron.training.repeated_failures import FAILURES

FOLDERS = frozenset({TOKENIZER, "checkpoints", LOGS, "plots", "tensorboard"})
# All that a run writes, apart from hidden files.
NAMES = FOLDERS | {
    CONFIG,
    METRICS,
    RANKS,
    FAILURES,
    "report.html",
    SAMPLE,
    "summary.json",
    "wandb_run_id",
    "mlflow_run_id",
}


def strangers(path: Path) -> list[str]:
    """Files in the folder that are not the run's, as a log that ``tee`` has opened; none without a folder.

    Raises:
        UserError: the run would write over it, or the folder is none for a run.
    """
    _refuse_place(path)
    if not path.exists():
        refuse_unwritable(path)
        return []
    if not path.is_dir():
        raise UserError(f"{path}: is a file, and a run needs a folder; choose another --save")
    # Hidden files are what a job leaves that was killed while it claimed the folder.
    there = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    # A folder of logs may be a batch system's: a rank's log is added to it.
    if taken := [name for name in there if name in NAMES - {LOGS}]:
        raise UserError(
            f"{path}: holds files that are not a run's, and a run would overwrite {', '.join(taken)}; "
            "choose another folder with --save"
        )
    refuse_misplaced(path)
    refuse_unwritable(path)
    return there


def refuse_misplaced(path: Path) -> None:
    """Refuse a file where the run keeps a folder, and the reverse, before there is work to lose."""
    for name in sorted(NAMES):
        entry = path / name
        if entry.exists() and entry.is_dir() != (name in FOLDERS):
            kinds = ("folder", "file") if entry.is_dir() else ("file", "folder")
            raise UserError(f"{entry}: is a {kinds[0]}, and the run keeps a {kinds[1]} there; move it away")


def _refuse_place(path: Path) -> None:
    full = path.resolve()
    home = os.environ.get("HOME")
    kind = None
    if full == Path(full.anchor):
        kind = "the root of the file system"
    elif home and full == Path(home).resolve():
        kind = "your home folder"
    elif (full / ".git").exists():
        kind = "a checkout"
    elif full in Path.cwd().parents:
        kind = "a folder around the one that you are in"
    if kind:
        raise UserError(f"{path}: is {kind}; give the run a folder of its own, as --save {path / 'run'}")


def refuse_unwritable(path: Path) -> None:
    """Refuse a folder in which nothing can be made, or that cannot be made, before there is work to lose."""
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(
            f"{path}: cannot be used as run folder ({nearest} cannot be written); change that or choose "
            "another --save"
        )
