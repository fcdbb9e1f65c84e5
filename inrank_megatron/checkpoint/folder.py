"""Checkpoints as folders: tensors in safetensors, the rest in JSON, complete or not there at all.

A checkpoint is written beside its final name, every byte flushed to the disk, and published by one rename.
Its manifest, written last, holds the size and SHA-256 of every other file and is checked before anything is
loaded. Tensors are whole (no shard of any rank), so a checkpoint does not depend on how many processes
wrote it.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inrank_megatron.checkpoint.disk import sync
from inrank_megatron.checkpoint.verify import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    STATE,
    Damaged,
    compare,
    damaged,
    read_index,
    read_json,
    read_manifest,
    read_state,
    sha256,
)
from inrank_megatron.errors import UserError

FILE_BYTES = 2**30
PREFIX, PARTIAL, REPLACED = "step_", ".partial", ".replaced"
SET_ASIDE = "set_aside"


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps lies."""
    return root / f"{PREFIX}{step:08d}"


class CheckpointWriter:
    """Collects whole tensors into files of about ``file_bytes`` and publishes the folder at the end.

    A write that fails is reported by :meth:`publish` alone: the ranks that gather tensors for this one must
    all come to the end before they can learn of it.

    Args:
        deferred: keep all tensors and touch no file before :meth:`publish`, which may then run in another
            thread. Else files are written as they fill: at most ``file_bytes`` plus one tensor in memory.
        file_bytes: ``FILE_BYTES`` where none is given.
    """

    def __init__(self, root: Path, step: int, *, deferred: bool = False, file_bytes: int | None = None):
        self.final = step_folder(root, step)
        self.partial = root / f".{self.final.name}{PARTIAL}"
        self.deferred = deferred
        self._file_bytes = FILE_BYTES if file_bytes is None else file_bytes
        self._pending: list[dict[str, Tensor]] = [{}]  # one for each file
        self._bytes = 0  # of the last of them
        self._names: set[str] = set()
        self._index: dict[str, str] = {}
        self._fault: Exception | None = None
        if not deferred:
            self._attempt(self._begin)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one whole tensor; names are unique."""
        if name in self._names:
            raise ValueError(f"tensor {name} is in the checkpoint twice")
        self._names.add(name)
        if self._fault is None:
            self._pending[-1][name] = tensor.detach().to("cpu", copy=True).contiguous()
            self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes >= self._file_bytes:
            if not self.deferred:
                self._attempt(self._flush)
            self._pending.append({})
            self._bytes = 0

    def publish(self, state: dict) -> Path:
        """Write ``state`` and the manifest, and give the folder its name, in place of an older one.

        Raises:
            UserError: something could not be written; earlier checkpoints stay as they are.
        """
        if self.deferred:
            self._attempt(self._begin)
        self._attempt(self._flush)
        self._attempt(lambda: self._complete(state))
        if self._fault is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise UserError(
                f"{self.final}: the checkpoint cannot be written ({self._fault}); earlier ones are complete: "
                "make room for it, then continue with --resume auto"
            )
        return self.final

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._fault is None:
            try:
                action()
            except (OSError, SafetensorError) as fault:
                self._fault, self._pending, self._bytes = fault, [{}], 0

    def _begin(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def _flush(self) -> None:
        while self._pending:
            tensors = self._pending.pop(0)
            if tensors:
                file = f"tensors_{len(set(self._index.values())):05d}.safetensors"
                save_file(tensors, self.partial / file)
                sync(self.partial / file)
                self._index.update(dict.fromkeys(tensors, file))

    def _complete(self, state: dict) -> None:
        _write_json(self.partial / STATE, state)
        _write_json(self.partial / INDEX, self._index)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(self.partial.iterdir())
        }
        _write_json(self.partial / MANIFEST, {"format_version": FORMAT_VERSION, "files": files})
        for path in (self.partial / STATE, self.partial / INDEX, self.partial / MANIFEST, self.partial):
            sync(path)
        replaced = self.final.with_name(f".{self.final.name}{REPLACED}")
        if self.final.exists():
            self.final.rename(replaced)
        self.partial.rename(self.final)
        sync(self.final.parent)
        shutil.rmtree(replaced, ignore_errors=True)


class Checkpoint:
    """A published checkpoint, verified when it is opened (``verify.py``).

    Args:
        verify: False where it has just been compared with its manifest, because that reads every byte.

    Raises:
        Damaged: a file is missing, truncated or altered, or makes no sense.
        UserError: the format is of another version, or the files cannot be read.
    """

    def __init__(self, folder: Path, *, verify: bool = True):
        self.folder = folder
        files = read_manifest(folder)
        if verify:
            compare(folder, files)
        self._index, self._shapes = read_index(folder, files)
        self.state = read_state(folder, self._shapes)
        number = folder.name.removeprefix(PREFIX)
        if number.isdecimal() and self.state.get("step", int(number)) != int(number):
            damaged(folder / STATE, f"it is of step {self.state['step']}")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._index)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """``(name, whole tensor)`` on the CPU for each of ``names``, file by file."""
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self._index[name], []).append(name)
        for file, group in wanted.items():
            try:
                with safe_open(self.folder / file, framework="pt") as handle:
                    for name in group:
                        yield name, handle.get_tensor(name)
            except SafetensorError as error:
                damaged(self.folder / file, f"no tensor file ({error})")

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor; its values are not read."""
        return self._shapes[name]


def published(root: Path) -> list[Path]:
    """Folders of published checkpoints, of the latest step first."""
    found = [p for p in root.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix(PREFIX))


def is_set_aside(folder: Path) -> bool:
    """Whether the run went back to an earlier step since: it is whole, but no newest one any more."""
    return (folder / SET_ASIDE).exists()


def peek(folder: Path) -> dict:
    """The state that a checkpoint records, unverified; empty where it cannot be read."""
    try:
        state = read_json(folder / STATE)
    except UserError:
        return {}
    return state if isinstance(state, dict) else {}


def newest_complete(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes verification, and a message for every newer one that is damaged.

    Raises:
        UserError: a newer one may be whole, but this process or this version cannot read it: going on from an
            older one would in time replace it.
    """
    faults: list[str] = []
    for folder in published(root):
        if is_set_aside(folder):
            continue
        try:
            Checkpoint(folder)
            return folder, faults
        except Damaged as fault:
            faults.append(str(fault))
    return None, faults


def by_loss(root: Path) -> list[Path]:
    """Published checkpoints with a validation loss on record, the lowest first and of equals the newest.

    Those alone whose loss is over as many tokens as that of the newest: losses over other tokens, as from
    before `--eval-iters` was changed, do not compare. What was set aside is no part of the run.
    """
    states = {folder: peek(folder) for folder in published(root) if not is_set_aside(folder)}
    judged = [f for f in states if type(states[f].get("validation_loss")) in (int, float)]
    tokens = {folder: states[folder].get("validation_tokens") for folder in judged}
    alike = [folder for folder in judged if tokens[folder] == tokens[judged[0]]]
    return sorted(alike, key=lambda folder: states[folder]["validation_loss"])


def best_complete(root: Path) -> tuple[Path | None, list[str]]:
    """The whole checkpoint with the lowest validation loss on record; where none has one the newest.
    None if no checkpoint is whole. With it a message for every better one that is damaged.

    Raises:
        UserError: one may be whole, but this process or this version cannot read it.
    """
    faults: list[str] = []
    for folder in by_loss(root):
        try:
            return Checkpoint(folder).folder, faults
        except Damaged as fault:
            faults.append(str(fault))
    folder, others = newest_complete(root)
    return folder, list(dict.fromkeys([*faults, *others]))


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True))
