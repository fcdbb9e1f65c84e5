"""Checkpoints as folders: tensors in safetensors, the rest in JSON, complete or not there at all.

A checkpoint is written beside its final name, every byte flushed to the disk, and published by one rename.
Its manifest, written last, holds the size and SHA-256 of every other file and is checked before anything is
loaded. Tensors are whole (no shard of any rank), so a checkpoint does not depend on how many processes
wrote it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inrank_megatron.errors import UserError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
INDEX = "index.json"
STATE = "state.json"
FILE_BYTES = 2**30
PREFIX, PARTIAL, REPLACED = "step_", ".partial", ".replaced"


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps lies."""
    return root / f"{PREFIX}{step:08d}"


class CheckpointWriter:
    """Collects whole tensors into files of about ``FILE_BYTES`` and publishes the folder at the end.

    Memory: at most ``FILE_BYTES`` plus one tensor. A write that fails is reported by :meth:`publish` alone:
    the ranks that gather tensors for this one must all come to the end before they can learn of it.
    """

    def __init__(self, root: Path, step: int):
        self.final = step_folder(root, step)
        self.partial = root / f".{self.final.name}{PARTIAL}"
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self._index: dict[str, str] = {}
        self._fault: Exception | None = None
        self._attempt(self._begin)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one whole tensor; names are unique."""
        if name in self._index or name in self._pending:
            raise ValueError(f"tensor {name} is in the checkpoint twice")
        if self._fault is None:
            self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
            self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes >= FILE_BYTES:
            self._attempt(self._flush)

    def publish(self, state: dict) -> Path:
        """Write ``state`` and the manifest, and give the folder its name, in place of an older one.

        Raises:
            UserError: something could not be written; earlier checkpoints stay as they are.
        """
        self._attempt(self._flush)
        self._attempt(lambda: self._complete(state))
        if self._fault is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise UserError(
                f"{self.final}: the checkpoint cannot be written ({self._fault}); earlier ones are whole: "
                "make room for it, then continue with --resume auto"
            )
        return self.final

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._fault is None:
            try:
                action()
            except (OSError, SafetensorError) as fault:
                self._fault, self._pending, self._bytes = fault, {}, 0

    def _begin(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def _flush(self) -> None:
        if self._pending:
            file = f"tensors_{len(set(self._index.values())):05d}.safetensors"
            save_file(self._pending, self.partial / file)
            self._index.update(dict.fromkeys(self._pending, file))
            self._pending, self._bytes = {}, 0

    def _complete(self, state: dict) -> None:
        _write_json(self.partial / STATE, state)
        _write_json(self.partial / INDEX, self._index)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(self.partial.iterdir())
        }
        _write_json(self.partial / MANIFEST, {"format_version": FORMAT_VERSION, "files": files})
        for path in (*self.partial.iterdir(), self.partial):
            _fsync(path)
        replaced = self.final.with_name(f".{self.final.name}{REPLACED}")
        if self.final.exists():
            self.final.rename(replaced)
        self.partial.rename(self.final)
        _fsync(self.final.parent)
        shutil.rmtree(replaced, ignore_errors=True)


class Damaged(UserError):
    """A checkpoint that is incomplete or not what was written: another one has to do."""


class Checkpoint:
    """A published checkpoint, verified against its manifest when it is opened.

    Args:
        verify: False where it has just been verified, because that reads every byte.

    Raises:
        Damaged: a file is missing, truncated or altered.
        UserError: the format is of another version, or the files cannot be read.
    """

    def __init__(self, folder: Path, *, verify: bool = True):
        self.folder = folder
        for name, expected in _manifest(folder).items() if verify else ():
            if not _is_as_written(folder / name, expected):
                raise Damaged(
                    f"{folder / name}: missing, truncated or altered (its SHA-256 is not the manifest's); "
                    "resume from another checkpoint"
                )
        self._index: dict[str, str] = json.loads((folder / INDEX).read_text())
        self.state: dict = json.loads((folder / STATE).read_text())

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._index)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """``(name, whole tensor)`` on the CPU for each of ``names``, file by file."""
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self._index[name], []).append(name)
        for file, group in wanted.items():
            with safe_open(self.folder / Path(file).name, framework="pt") as handle:
                for name in group:
                    yield name, handle.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor; its values are not read."""
        with safe_open(self.folder / Path(self._index[name]).name, framework="pt") as handle:
            return tuple(handle.get_slice(name).get_shape())


def published(root: Path) -> list[Path]:
    """Folders of published checkpoints, newest first."""
    found = [p for p in root.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)), reverse=True)


def peek(folder: Path) -> dict:
    """The state that a checkpoint records, unverified; empty where it cannot be read."""
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def newest_complete(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes verification, and a message for every newer one that is damaged.

    Raises:
        UserError: a newer one may be whole, but this process or this version cannot read it: going on from an
            older one would in time replace it.
    """
    faults = []
    for folder in published(root):
        try:
            Checkpoint(folder)
            return folder, faults
        except Damaged as fault:
            faults.append(str(fault))
    return None, faults


def best_complete(root: Path) -> Path | None:
    """The whole checkpoint with the lowest recorded validation loss, the newer of equals; where none has one
    on record the newest. None if no checkpoint is whole.

    Raises:
        UserError: one may be whole, but this process or this version cannot read it.
    """
    best: tuple[float, Path] | None = None
    newest = None
    for folder in published(root):
        try:
            loss = Checkpoint(folder).state.get("validation_loss")
        except Damaged:
            continue
        newest = newest or folder
        if loss is not None and (best is None or loss < best[0]):
            best = loss, folder
    return best[1] if best else newest


def tidy(root: Path) -> None:
    """Remove what a killed writer left behind; only the one process that may write calls it."""
    for path in root.glob(f".{PREFIX}*{REPLACED}"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(REPLACED))
        if final.exists():
            shutil.rmtree(path)
        else:
            # Killed between the two renames: the older checkpoint of the step is still good.
            path.rename(final)
    for path in root.glob(f".{PREFIX}*{PARTIAL}"):
        shutil.rmtree(path)


def _manifest(folder: Path) -> dict[str, dict]:
    """File name -> size and hash. Every file that is read from the folder must be among them."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, files = manifest["format_version"], manifest["files"]
        whole = {INDEX, STATE} <= files.keys() and all(
            Path(name).name == name and {"bytes", "sha256"} <= entry.keys() for name, entry in files.items()
        )
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise _unreadable(folder / MANIFEST, error) from None
        whole = False
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise Damaged(
            f"{folder}: {MANIFEST} is missing or unreadable, so the checkpoint is not complete; "
            "resume from another one"
        )
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder}: checkpoint format {version}, this version reads {FORMAT_VERSION}; "
            "use the version of the program that wrote it"
        )
    return files


def _is_as_written(path: Path, expected: dict) -> bool:
    try:
        return path.stat().st_size == expected["bytes"] and _sha256(path) == expected["sha256"]
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); mend that, or start with another --save")


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
