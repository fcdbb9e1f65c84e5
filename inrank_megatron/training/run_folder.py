"""The run folder: which one, whether this run may use it, and what to resume from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from inrank_megatron.checkpoint.disk import sync
from inrank_megatron.checkpoint.folder import (
    Checkpoint,
    is_set_aside,
    open_newest,
    peek,
    published,
    step_folder,
    step_of,
)
from inrank_megatron.checkpoint.index import Examine, examine
from inrank_megatron.checkpoint.locate import CONFIG, TOKENIZER
from inrank_megatron.checkpoint.retention import go_back, tidy
from inrank_megatron.checkpoint.verify import check_resumable
from inrank_megatron.checkpoint.weights import is_weights_only
from inrank_megatron.config.folders import named_folder
from inrank_megatron.config.loading import load, to_yaml
from inrank_megatron.config.schema import Config
from inrank_megatron.data.tokenizer import Tokenizer
from inrank_megatron.errors import UserError
from inrank_megatron.reporting.files import METRICS, read_records, write_atomically
from inrank_megatron.training.examining import Leaders
from inrank_megatron.training.folder_lock import FolderLock
from inrank_megatron.training.repeated_failures import refuse_repeated
from inrank_megatron.training.resume_rules import changes, refuse_another_run
from inrank_megatron.training.run_place import refuse_misplaced, refuse_unwritable, strangers
from inrank_megatron.training.schedule import changed_rate


@dataclass(frozen=True)
class RunFolder:
    """``is_new``: no run is there yet. ``opened``: where to go on; ``goes_back``: it was asked for by its
    step, so later ones are not part of the run any more. ``notes``: messages for the user.

    Where each host has a folder of its own, ``leaders`` has the first rank on the host of each rank, and
    ``holders`` one rank of each host that has a file of the checkpoint.
    """

    path: Path
    is_new: bool = True
    opened: Checkpoint | None = None
    goes_back: bool = False
    notes: list[str] = field(default_factory=list)
    leaders: Leaders | None = None
    holders: Mapping[str, list[int]] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the one where to go on."""
        return None if self.opened is None else self.opened.folder

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def choose_run_folder(
    config: Config, lock: FolderLock, *, name: str, examine: Examine = examine
) -> RunFolder:
    """Choose the run folder and look into it; it is locked if it exists. Called on one rank.

    Args:
        name: of the configuration; without ``save`` the folder is ``runs/<name>-<method>``, with a number
            if taken.
        examine: see :class:`Checkpoint`.

    Raises:
        UserError: the folder holds another run, or this run without ``--resume``, or something that is
            no run, or only broken checkpoints, or none of the step asked for; or another job is running in
            it.
    """
    if config.training.save is None:
        _refuse_step(config, "no --save names a run")
        refuse_unwritable(Path("runs"))
        return RunFolder(_unused(Path("runs") / f"{name}-{config.training.method}"))
    path = named_folder(config.training.save, flag="--save")
    try:
        return _existing(path, config, lock, examine)
    except OSError as error:
        raise _unusable(path, error) from None


def claim(run: RunFolder, config: Config, lock: FolderLock, tokenizer: Tokenizer) -> None:
    """Make the folder and store configuration and tokenizer in it. Called on one rank, or one of each host,
    once nothing can be refused.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock.take(run.path)
        if run.is_new and (run.path / CONFIG).exists():
            raise UserError(f"{run.path}: another job has just begun a run in it; choose another --save")
        write_atomically(run.path / CONFIG, to_yaml(config).encode())
        tokenizer.save(run.path / TOKENIZER)
        run.checkpoints.mkdir(exist_ok=True)
        tidy(run.checkpoints)
        sync(run.path)
        if run.goes_back:
            go_back(run.checkpoints, step_of(run.checkpoint))
    except OSError as error:
        raise _unusable(run.path, error) from None


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


def _existing(path: Path, config: Config, lock: FolderLock, examine: Examine) -> RunFolder:
    if not (path / CONFIG).is_file():
        others = strangers(path)
        _refuse_step(config, f"{path} holds no run")
        notes = [f"{path} holds {', '.join(others)}, which the run leaves alone"] if others else []
        return RunFolder(path, notes=notes)
    before, resume = _stored(path / CONFIG), config.training.resume
    refuse_another_run(path, before, config, weights_only=_goes_on_from_weights(path, resume))
    if resume == "never":
        raise UserError(
            f"{path}: holds this run already; continue it with --resume auto or choose another --save"
        )
    refuse_misplaced(path)
    refuse_repeated(path, config)
    lock.take(path)
    changed = [words for name, words in changes(before, config).items() if name not in ("resume", "save")]
    folder = _resumable(path, changed, step=None if resume == "auto" else resume, examine=examine)
    if folder.checkpoint and (note := changed_rate(step_of(folder.checkpoint), before, config)):
        folder.notes.append(note)
    return folder


def _stored(path: Path) -> Config:
    try:
        return load(path)
    except UserError as error:
        raise UserError(f"{error}; if that file is not a run's, choose another --save") from None


def _refuse_step(config: Config, reason: str) -> None:
    if isinstance(step := config.training.resume, int):
        raise UserError(f"resume = {step}: {reason}; name the run with --save, or drop --resume")


def _goes_on_from_weights(path: Path, resume: str | int) -> bool:
    newest = (f for f in published(path / "checkpoints") if not is_set_aside(f))
    chosen = step_folder(path / "checkpoints", resume) if isinstance(resume, int) else next(newest, None)
    return chosen is not None and is_weights_only(peek(chosen))


def _resumable(path: Path, changed: list[str], *, step: int | None, examine: Examine) -> RunFolder:
    root = path / "checkpoints"
    tidy(root)
    if step is None:
        checkpoint, faults = open_newest(root, examine=examine)
    else:
        checkpoint, faults = Checkpoint(_of_step(root, step), examine=examine), []
    if checkpoint is None:
        return _without_checkpoint(path, faults)
    notes = [f"skipped a broken checkpoint: {fault}" for fault in faults]
    check_resumable(checkpoint.folder, checkpoint.state)
    if is_weights_only(checkpoint.state):
        notes.append(
            f"{checkpoint.folder} holds weights alone: moments, their step counts and the loss scale start "
            "from zero"
        )
    if changed:
        notes.append(f"changed since the run began: {', '.join(changed)}")
    if later := [step_of(f) for f in published(root) if step is not None and step_of(f) > step]:
        notes.append(
            f"goes back to step {step}: records of later steps go, later checkpoints (step "
            f"{_listed(later)}) stay aside until the run comes to their step, or --resume names one"
        )
    return RunFolder(path, is_new=False, opened=checkpoint, goes_back=step is not None, notes=notes)


def _without_checkpoint(path: Path, faults: list[str]) -> RunFolder:
    """A run that saved nothing yet begins again; one whose checkpoints are gone does not."""
    if faults:
        raise UserError(
            f"{path}: none of its checkpoints is complete ({'; '.join(faults)}); "
            "start again with another --save"
        )
    if aside := [step_of(folder) for folder in published(path / "checkpoints")]:
        raise UserError(
            f"{path}: its checkpoints of steps {_listed(aside)} were set aside when the run went back to "
            "an earlier one, which is gone; name one of them with --resume"
        )
    saved = [r["step"] for r in read_records(path / METRICS) if r.get("kind") == "checkpoint"]
    if saved:
        raise UserError(
            f"{path}: its records name a checkpoint at step {saved[-1]}, and there is none; put it "
            "back, or start again with another --save"
        )
    notes = [f"{path} holds no checkpoint yet: the run starts from the beginning"]
    return RunFolder(path, is_new=False, notes=notes)


def _of_step(root: Path, step: int) -> Path:
    """The folder of the step that the user names."""
    there = {step_of(folder): folder for folder in published(root)}
    if step not in there:
        steps = f"there are those of steps {_listed(there)}" if there else "there is none at all"
        raise UserError(
            f"resume = {step}: {root} has no checkpoint of that step, {steps}; name one of them or give "
            "--resume auto"
        )
    return there[step]


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(steps)))
