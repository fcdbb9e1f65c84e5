"""Checkpoints as folders: tensors in safetensors, the rest in JSON, complete or not there at all.

A checkpoint is written beside its final name, every byte flushed to the disk, and published by one rename. Its
manifest, written last, holds the size and SHA-256 of every file and is checked before anything is loaded. Tensors are
whole (no shard of any rank), so a checkpoint does not depend on how many processes wrote it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from inrank_megatron.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
FILE_BYTES = 2**30


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps lies."""
    return root / f"step_{step:08d}"


class CheckpointWriter:
    """Collects whole tensors into files of about ``FILE_BYTES`` and publishes the folder at the end.

    Memory: at most ``FILE_BYTES`` plus one tensor.
    """

    def __init__(self, root: Path, step: int):
        self.final = step_folder(root, step)
        self.partial = root / f".{self.final.name}.partial"
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self._index: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one whole tensor; names are unique."""
        if name in self._index or name in self._pending:
            raise ValueError(f"tensor {name} is in the checkpoint twice")
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes >= FILE_BYTES:
            self._flush()

    def publish(self, state: dict) -> Path:
        """Write ``state`` and the manifest, and give the folder its name. An older folder of the step goes after."""
        self._flush()
        (self.partial / STATE).write_text(json.dumps(state, indent=1, sort_keys=True))
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                 for path in sorted(self.partial.iterdir())}
        manifest = {"format_version": FORMAT_VERSION, "files": files, "tensors": self._index}
        (self.partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        for path in self.partial.iterdir():
            _fsync(path)
        _fsync(self.partial)
        replaced = None
        if self.final.exists():
            replaced = self.final.with_name(f".{self.final.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            self.final.rename(replaced)
        self.partial.rename(self.final)
        _fsync(self.final.parent)
        if replaced:
            shutil.rmtree(replaced)
        return self.final

    def _flush(self) -> None:
        if self._pending:
            file = f"tensors_{len(set(self._index.values())):05d}.safetensors"
            save_file(self._pending, self.partial / file)
            self._index.update(dict.fromkeys(self._pending, file))
            self._pending, self._bytes = {}, 0


class Checkpoint:
    """A published checkpoint, verified against its manifest when it is opened.

    Raises:
        UserError: a file is missing, truncated or altered, or the format is of another version.
    """

    def __init__(self, folder: Path, *, verify: bool = True):
        self.folder = folder
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            files, self._index = manifest["files"], manifest["tensors"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{folder}: {MANIFEST} is missing or unreadable, so the checkpoint is not complete; "
                            "resume from another one") from None
        if manifest.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{folder}: checkpoint format {manifest.get('format_version')}, this version reads "
                            f"{FORMAT_VERSION}; use the version of the program that wrote it")
        for name, expected in files.items() if verify else ():
            path = folder / Path(name).name
            if not path.is_file() or path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
                raise UserError(f"{path}: missing, truncated or altered (its SHA-256 is not the manifest's); "
                                "resume from another checkpoint")
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


def published(root: Path) -> list[Path]:
    """Folders of published checkpoints, newest first."""
    found = [p for p in root.glob("step_*") if p.is_dir() and p.name[len("step_"):].isdigit()]
    return sorted(found, key=lambda p: int(p.name[len("step_"):]), reverse=True)


def newest_complete(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes verification, and a message for every newer one that does not."""
    faults = []
    for folder in published(root):
        try:
            Checkpoint(folder)
            return folder, faults
        except UserError as fault:
            faults.append(str(fault))
    return None, faults


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
