"""Writing a checkpoint: every rank its part, the first one what makes it complete.

The folder has a hidden name at first. A part is a few files of its own, flushed to the disk and hashed by the
rank that wrote them. When all parts are there, the writer of the first adds state, index and manifest, and
publishes the folder by one rename.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from inrank_megatron.checkpoint.disk import sync
from inrank_megatron.checkpoint.folder import PARTIAL, REPLACED, step_folder
from inrank_megatron.checkpoint.slices import Box, Shape, Slice, fill, full_slice, key
from inrank_megatron.checkpoint.verify import FORMAT_VERSION, INDEX, MANIFEST, STATE, sha256
from inrank_megatron.errors import UserError

FILE_BYTES = 2**30


@dataclass
class Part:
    """What one rank has written.

    Attributes:
        files: name -> size and SHA-256, as in the manifest.
        index: name of a tensor -> full shape, and file and box of each slice, as in the index.
    """

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    index: dict[str, dict[str, Any]] = field(default_factory=dict)


class PartWriter:
    """Collects slices into files of about ``file_bytes``.

    A write that fails is reported by :meth:`close` alone: all ranks must come to the end before they can
    learn of it.

    Args:
        part: its number; one writer begins the folder and publishes it.
        host: recorded with every file, where hosts do not share the folder.
        deferred: keep all slices and touch no file before :meth:`close`, which may then run in another
            thread. Else files are written as they fill: at most ``file_bytes`` plus one slice in memory.
        file_bytes: ``FILE_BYTES`` where none is given.
    """

    def __init__(
        self,
        root: Path,
        step: int,
        *,
        part: int,
        deferred: bool = False,
        file_bytes: int | None = None,
        host: str | None = None,
    ):
        self.final = step_folder(root, step)
        self.partial = root / f".{self.final.name}{PARTIAL}"
        self.deferred = deferred
        self._number, self._host = part, {} if host is None else {"host": host}
        self._file_bytes = FILE_BYTES if file_bytes is None else file_bytes
        self._pending: list[dict[str, Tensor]] = [{}]  # one for each file
        self._bytes = 0  # of the last of them
        self._placed: dict[str, tuple[str, Box, Shape]] = {}
        self._part = Part()
        self._fault: Exception | None = None

    def begin(self) -> None:
        """Make the hidden folder, empty; no part is written before."""
        self._attempt(self._begin)

    def add(self, piece: Slice) -> None:
        """Add a copy of one slice; each comes once."""
        name = key(piece.name, piece.box, piece.full_shape)
        if name in self._placed:
            raise ValueError(f"tensor {name} is in the checkpoint twice")
        self._placed[name] = piece.name, piece.box, piece.full_shape
        if self._fault is None:
            values = self._pending[-1][name] = piece.values.detach().to("cpu", copy=True).contiguous()
            self._bytes += values.numel() * values.element_size()
        if self._bytes >= self._file_bytes:
            if not self.deferred:
                self._attempt(self._flush)
            self._pending.append({})
            self._bytes = 0

    def close(self) -> Part:
        """Write what is left.

        Raises:
            UserError: something could not be written; earlier checkpoints stay as they are.
        """
        self._attempt(self._flush)
        self._raise_fault()
        return self._part

    def publish(self, parts: Sequence[Part], state: dict) -> Path:
        """Write ``state``, index and manifest, and give the folder its name, in place of an older one.

        Raises:
            ValueError: the parts do not make up every tensor.
            UserError: as :meth:`close`.
        """
        return self.publish_documents(documents(parts, state))

    def publish_documents(self, documents: Mapping[str, bytes]) -> Path:
        """:meth:`publish` with what :func:`documents` has made on this rank or another."""
        self._attempt(lambda: self._complete(documents))
        self._raise_fault()
        return self.final

    def discard(self) -> None:
        """Remove what has been written."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._fault is None:
            try:
                action()
            except (OSError, SafetensorError) as fault:
                self._fault, self._pending, self._bytes = fault, [{}], 0

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise UserError(
                f"{self.final}: the checkpoint cannot be written ({self._fault}); earlier ones are complete: "
                "make room for it, then continue with --resume auto"
            )

    def _begin(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def _flush(self) -> None:
        while self._pending:
            tensors = self._pending.pop(0)
            if tensors:
                number = len(self._part.files)
                file = f"tensors_{self._number:05d}{f'_{number:05d}' if number else ''}.safetensors"
                save_file(tensors, self.partial / file)
                sync(self.partial / file)
                self._part.files[file] = _entry(self.partial / file) | self._host
                for name in tensors:
                    self._record(file, *self._placed[name])

    def _record(self, file: str, name: str, box: Box, full_shape: Shape) -> None:
        entry = self._part.index.setdefault(name, {"shape": list(full_shape), "slices": []})
        entry["slices"].append({"file": file, "offset": list(box[0]), "shape": list(box[1])})

    def _complete(self, documents: Mapping[str, bytes]) -> None:
        for name, content in documents.items():
            _write(self.partial / name, content)
        sync(self.partial)
        replaced = self.final.with_name(f".{self.final.name}{REPLACED}")
        if self.final.exists():
            self.final.rename(replaced)
        self.partial.rename(self.final)
        sync(self.final.parent)
        shutil.rmtree(replaced, ignore_errors=True)


class CheckpointWriter:
    """Writes a checkpoint in one part, as a single process does; see :class:`PartWriter`."""

    def __init__(self, root: Path, step: int, *, file_bytes: int | None = None):
        self._writer = PartWriter(root, step, part=0, file_bytes=file_bytes)
        self._writer.begin()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one full tensor; names are unique."""
        self._writer.add(full_slice(name, tensor))

    def publish(self, state: dict) -> Path:
        """Write ``state`` and the manifest, and give the folder its name, in place of an older one.

        Raises:
            UserError: something could not be written; earlier checkpoints stay as they are.
        """
        try:
            return self._writer.publish([self._writer.close()], state)
        except UserError:
            self._writer.discard()
            raise


def documents(parts: Sequence[Part], state: dict) -> dict[str, bytes]:
    """State, index and manifest of a checkpoint, by file name; the manifest is the last.

    Raises:
        ValueError: the parts do not make up every tensor.
    """
    made = {STATE: _json(state), INDEX: _json(_merged(parts))}
    files = {name: entry for part in parts for name, entry in part.files.items()}
    for name, content in made.items():
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {**made, MANIFEST: _json({"format_version": FORMAT_VERSION, "files": files})}


def _merged(parts: Sequence[Part]) -> dict[str, dict]:
    """One index of all parts."""
    merged: dict[str, dict] = {}
    for part in parts:
        for name, entry in part.index.items():
            merged.setdefault(name, {"shape": entry["shape"], "slices": []})["slices"] += entry["slices"]
    for name, entry in merged.items():
        placed = [(tuple(piece["offset"]), tuple(piece["shape"])) for piece in entry["slices"]]
        if not fill(tuple(entry["shape"]), placed):
            raise ValueError(f"the parts of a checkpoint do not make up {name}: {entry}")
    return merged


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _json(value: dict) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)
