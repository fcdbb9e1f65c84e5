"""The run folder: which one, whether this run may use it, and what to resume from."""

import errno
import fcntl
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from inrank_megatron.checkpoint.disk import sync
from inrank_megatron.checkpoint.folder import (
    Checkpoint,
    is_set_aside,
    newest_complete,
    peek,
    published,
    step_folder,
    step_of,
)
from inrank_megatron.checkpoint.locate import CONFIG, TOKENIZER
from inrank_megatron.checkpoint.retention import go_back, tidy
from inrank_megatron.checkpoint.verify import check_resumable
from inrank_megatron.checkpoint.weights import is_weights_only
from inrank_megatron.config.loading import flatten, load, sections, to_yaml
from inrank_megatron.config.schema import Config
from inrank_megatron.data.tokenizer import Tokenizer
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.inrank import PatienceSettings
from inrank_megatron.lowrank.methods.registry import idle_settings
from inrank_megatron.lowrank.methods.switch import SwitchSettings
from inrank_megatron.reporting.files import METRICS, read_records, write_atomically
from inrank_megatron.training.run_place import refuse_unwritable, strangers
from inrank_megatron.training.schedule import changed_rate

LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# Where things lie, which may change when a run is resumed, and differ from host to host: whether they are the
# same data, every checkpoint's own record says.
PLACES = frozenset(
    {
        "save",
        "data_cache_path",
        "data_path",
        "train_data_path",
        "valid_data_path",
        "test_data_path",
        "dataset",
        "tokenizer",
    }
)
# What may change besides: where a run runs, how long, how it is watched and how it is optimized.
FREE = PLACES | frozenset(
    {
        "train_iters",
        "save_interval",
        "keep_last",
        "resume",
        "exit_duration_in_mins",
        "log_interval",
        "eval_interval",
        "eval_iters",
        "distributed_timeout_minutes",
        "replica_check_interval",
        "tensor_model_parallel_size",
        "sequence_parallel",
        "micro_batch_size",
        "recompute_granularity",
        "deterministic_mode",
        "zero_stage",
        "offload_optimizer",
        "loss_scale_window",
        "hysteresis",
        "overflow_limit",
        *sections()["optimizer"].model_fields,
    }
)
# Weights alone have seen neither data nor a switch: fixed is what gives them their meaning.
FREE_WITH_WEIGHTS_ONLY = (
    FREE
    | {name for section in ("training", "parallel", "data") for name in sections()[section].model_fields}
    | {*SwitchSettings.model_fields, *PatienceSettings.model_fields}
) - {"method"}


@dataclass(frozen=True)
class RunFolder:
    """``is_new``: no run is there yet. ``checkpoint``: where to go on; ``goes_back``: it was asked for by its
    step, so later ones are no part of the run any more. ``notes``: what to tell the user.
    """

    path: Path
    is_new: bool = True
    checkpoint: Path | None = None
    goes_back: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


class FolderLock:
    """Keeps a second job out of a run folder until this process ends; taken on the one rank that writes.

    Attributes:
        note: what to tell the user where files cannot be locked, as on Lustre mounted without ``flock``.
    """

    def __init__(self):
        self._lock: FileLock | None = None
        self.note: str | None = None

    def take(self, path: Path) -> None:
        """Lock the existing folder; nothing happens if this object has locked it before."""
        if not _can_lock(path / LOCK):
            self.note = f"{path}: its file system has no locks; start no second job in it"
            return
        lock = self._lock or FileLock(path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{path}: another job is running in it; wait for its end or choose another --save"
            ) from None
        self._lock = lock


def _can_lock(path: Path) -> bool:
    """Not left to filelock: where it cannot lock, what it leaves instead outlives a job that is killed."""
    with open(path, "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in WITHOUT_LOCKS
        return True


def choose_run_folder(config: Config, lock: FolderLock, *, name: str) -> RunFolder:
    """Choose the run folder and look into it; it is locked if it exists. Called on one rank.

    Args:
        name: of the configuration; without ``save`` the folder is ``runs/<name>-<method>``, with a number
            if taken.

    Raises:
        UserError: the folder holds another run, or this run without ``--resume``, or something that is
            no run, or only broken checkpoints, or none of the step asked for; or another job is running in
            it.
    """
    if config.training.save is None:
        _refuse_step(config, "no --save names a run")
        refuse_unwritable(Path("runs"))
        return RunFolder(_unused(Path("runs") / f"{name}-{config.training.method}"))
    path = Path(config.training.save).expanduser()
    try:
        return _existing(path, config, lock)
    except OSError as error:
        raise _unusable(path, error) from None


def claim(run: RunFolder, config: Config, lock: FolderLock, tokenizer: Tokenizer) -> None:
    """Make the folder and store configuration and tokenizer in it. Called on one rank, once nothing can be
    refused.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock.take(run.path)
        if run.is_new and (run.path / CONFIG).exists():
            raise UserError(f"{run.path}: another job has just begun a run in it; choose another --save")
        write_atomically(run.path / CONFIG, to_yaml(config).encode())
        tokenizer.save(run.path / TOKENIZER)
        run.checkpoints.mkdir(exist_ok=True)
        sync(run.path)
        if run.goes_back:
            go_back(run.checkpoints, step_of(run.checkpoint))
    except OSError as error:
        raise _unusable(run.path, error) from None


def settings_in_common(config: Config) -> dict[str, object]:
    """The settings that must be alike on all ranks of a run."""
    differ = PLACES | {"pretrained_checkpoint"}
    return {name: value for name, value in flatten(config).items() if name not in differ}


def _unusable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be used as run folder ({error.strerror}); change that or choose another --save"
    )


def _unused(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _existing(path: Path, config: Config, lock: FolderLock) -> RunFolder:
    if not (path / CONFIG).is_file():
        others = strangers(path)
        _refuse_step(config, f"{path} holds no run")
        notes = [f"{path} holds {', '.join(others)}, which the run leaves alone"] if others else []
        return RunFolder(path, notes=notes)
    before = _stored(path / CONFIG)
    stored, wanted = flatten(before), flatten(config)
    idle = idle_settings(config.training.method)
    different = [name for name in wanted if stored[name] != wanted[name] and name not in idle]
    resume = config.training.resume
    free = FREE_WITH_WEIGHTS_ONLY if _goes_on_from_weights(path, resume) else FREE
    fixed = [
        f"{name} {stored[name]!r} there, {wanted[name]!r} here" for name in different if name not in free
    ]
    if fixed:
        # Where nobody gave it, the batch follows from the processes and the micro-batch, which may change.
        batch = stored["global_batch_size"]
        theirs = f"its settings, as in --config {path / CONFIG},"
        same = theirs if batch in (None, wanted["global_batch_size"]) else f"--global-batch-size {batch}"
        raise UserError(
            f"{path}: holds another run ({'; '.join(fixed)}); give {same} or choose another --save"
        )
    if resume == "never":
        raise UserError(
            f"{path}: holds this run already; continue it with --resume auto or choose another --save"
        )
    lock.take(path)
    changed = [
        f"{name} {stored[name]!r} -> {wanted[name]!r}" for name in different if name not in ("resume", "save")
    ]
    folder = _resumable(path, changed, step=None if resume == "auto" else resume)
    if folder.checkpoint and (note := changed_rate(step_of(folder.checkpoint), before, config)):
        folder.notes.append(note)
    return folder


def _stored(path: Path) -> Config:
    try:
        return load(path)
    except UserError as error:
        raise UserError(f"{error}; if that file is no run's, choose another --save") from None


def _refuse_step(config: Config, reason: str) -> None:
    if isinstance(step := config.training.resume, int):
        raise UserError(f"resume = {step}: {reason}; name the run with --save, or drop --resume")


def _goes_on_from_weights(path: Path, resume: str | int) -> bool:
    newest = (f for f in published(path / "checkpoints") if not is_set_aside(f))
    chosen = step_folder(path / "checkpoints", resume) if isinstance(resume, int) else next(newest, None)
    return chosen is not None and is_weights_only(peek(chosen))


def _resumable(path: Path, changed: list[str], *, step: int | None) -> RunFolder:
    root = path / "checkpoints"
    tidy(root)
    checkpoint, faults = newest_complete(root) if step is None else (_of_step(root, step), [])
    if checkpoint is None and faults:
        raise UserError(
            f"{path}: none of its checkpoints is complete ({'; '.join(faults)}); "
            "start anew with another --save"
        )
    notes = [f"skipped a broken checkpoint: {fault}" for fault in faults]
    if checkpoint is None:
        if aside := [step_of(folder) for folder in published(root)]:
            raise UserError(
                f"{path}: its checkpoints of steps {_listed(aside)} were set aside when the run went back to "
                "an earlier one, which is gone; name one of them with --resume"
            )
        saved = [r["step"] for r in read_records(path / METRICS) if r.get("kind") == "checkpoint"]
        if saved:
            raise UserError(
                f"{path}: its records tell of a checkpoint at step {saved[-1]}, and there is none; put it "
                "back, or start anew with another --save"
            )
        notes.append(f"{path} holds no checkpoint yet: the run starts from the beginning")
        return RunFolder(path, is_new=False, notes=notes)
    state = peek(checkpoint)
    check_resumable(checkpoint, state)
    if is_weights_only(state):
        notes.append(
            f"{checkpoint} holds weights alone: moments, their step counts and the loss scale begin anew"
        )
    if changed:
        notes.append(f"changed since the run began: {', '.join(changed)}")
    if later := [step_of(f) for f in published(root) if step is not None and step_of(f) > step]:
        notes.append(
            f"goes back to step {step}: records of later steps go, later checkpoints (step "
            f"{_listed(later)}) stay aside until the run comes to their step, or --resume names one"
        )
    return RunFolder(path, is_new=False, checkpoint=checkpoint, goes_back=step is not None, notes=notes)


def _of_step(root: Path, step: int) -> Path:
    """The verified checkpoint of a step that the user names."""
    there = {step_of(folder): folder for folder in published(root)}
    if step not in there:
        steps = f"there are those of steps {_listed(there)}" if there else "there is none at all"
        raise UserError(
            f"resume = {step}: {root} has no checkpoint of that step, {steps}; name one of them or give "
            "--resume auto"
        )
    return Checkpoint(there[step]).folder


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(steps)))
