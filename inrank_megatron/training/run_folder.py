"""The run folder: which one, whether this run may use it, and what to resume from."""

from dataclasses import dataclass, field
from pathlib import Path

from inrank_megatron.checkpoint.folder import newest_complete, published
from inrank_megatron.config import Config, flatten, load, sections, to_yaml
from inrank_megatron.errors import UserError
from inrank_megatron.reporting.files import write_atomically

CONFIG = "config.yaml"
# What may change when a run is resumed: where it runs, how long, how it is watched, and how it is optimized.
FREE = frozenset({
    "train_iters", "save", "save_interval", "resume", "exit_duration_in_mins", "log_interval", "eval_interval",
    "eval_iters", "distributed_timeout_minutes", "data_cache_path", "tensor_model_parallel_size",
    "sequence_parallel", "micro_batch_size", "switch_iters", "switch_epochs",
    *sections()["optimizer"].model_fields,
})


@dataclass(frozen=True)
class RunFolder:
    """``checkpoint``: the one to resume from, or None. ``notes``: what the user should be told."""

    path: Path
    checkpoint: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def choose_run_folder(config: Config, *, name: str) -> RunFolder:
    """Choose the run folder and look into it; nothing is written. Called on one rank.

    Args:
        name: of the configuration; without ``save`` the folder is ``runs/<name>-<method>``, with a number if taken.

    Raises:
        UserError: the folder holds another run, or this run without ``--resume auto``, or something that is no run,
            or only broken checkpoints.
    """
    if config.training.save is None:
        return RunFolder(_unused(Path("runs") / f"{name}-{config.training.method}"))
    return _existing(Path(config.training.save), config)


def claim(run: RunFolder, config: Config) -> None:
    """Make the folder and store the resolved configuration in it. Called on one rank, once nothing can be refused."""
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(run.path / CONFIG, to_yaml(config).encode())
    except OSError as error:
        raise UserError(f"{run.path}: cannot be written ({error.strerror}); choose another folder with --save") from None


def _unused(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _existing(path: Path, config: Config) -> RunFolder:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return RunFolder(path)
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: holds something that is no run; choose a new or an empty folder with --save")
    stored, wanted = flatten(load(path / CONFIG)), flatten(config)
    different = [name for name in wanted if stored[name] != wanted[name]]
    fixed = [f"{name} {stored[name]!r} there, {wanted[name]!r} here" for name in different if name not in FREE]
    if fixed:
        raise UserError(f"{path}: holds another run ({'; '.join(fixed)}); choose another folder with --save")
    if config.training.resume != "auto":
        raise UserError(f"{path}: holds this run already; continue it with --resume auto or choose another --save")
    checkpoint, faults = newest_complete(path / "checkpoints")
    if checkpoint is None and published(path / "checkpoints"):
        raise UserError(f"{path}: none of its checkpoints is complete ({'; '.join(faults)}); "
                        "start anew with another --save")
    notes = [f"skipped a broken checkpoint: {fault}" for fault in faults]
    if checkpoint is None:
        notes.append(f"{path} holds no checkpoint yet: the run starts from the beginning")
    shown = [f"{name} {stored[name]!r} -> {wanted[name]!r}" for name in different if name not in ("resume", "save")]
    if checkpoint is not None and shown:
        notes.append(f"changed since the run began: {', '.join(shown)}")
    return RunFolder(path, checkpoint, notes)
