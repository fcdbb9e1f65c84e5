"""Checkpoints as folders: tensors in safetensors, the rest in JSON, complete or not there at all.

The manifest, written last (``writing.py``), holds the size and SHA-256 of every other file and is checked
before anything is loaded. Files hold slices of full tensors, however the ranks that wrote them had sharded
them: who reads gets full tensors and need not know how many processes wrote them.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from inrank_megatron.checkpoint.index import Entry, Examine, Portion, examine, read_box, read_index
from inrank_megatron.checkpoint.slices import Box
from inrank_megatron.checkpoint.verify import (
    STATE,
    Damaged,
    damaged,
    read_json,
    read_manifest,
    read_state,
)
from inrank_megatron.errors import UserError

PREFIX, PARTIAL, REPLACED = "step_", ".partial", ".replaced"
SET_ASIDE = "set_aside"


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps lies."""
    return root / f"{PREFIX}{step:08d}"


class Checkpoint:
    """A published checkpoint, verified when it is opened (``verify.py``).

    Args:
        verify: False where it has just been compared with its manifest, because that reads every byte.
        examine: how it is compared and its headers are read, if not by this process alone.

    Attributes:
        received: what another host has of it, where hosts do not share the folder.

    Raises:
        Damaged: a file is missing, truncated or altered, or makes no sense.
        UserError: the format is of another version, or the files cannot be read.
    """

    def __init__(self, folder: Path, *, verify: bool = True, examine: Examine = examine):
        self.folder = folder
        self.received: dict[Portion, Tensor] = {}
        self._index = read_index(folder, examine(folder, read_manifest(folder), verify=verify))
        self.state = read_state(folder, {name: entry.shape for name, entry in self._index.items()})
        number = folder.name.removeprefix(PREFIX)
        if number.isdecimal() and self.state.get("step", int(number)) != int(number):
            damaged(folder / STATE, f"it is of step {self.state['step']}")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._index)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """``(name, full tensor)`` on the CPU for each of ``names``."""
        for name in names:
            shape = self.shape(name)
            yield name, self.read(name, ((0,) * len(shape), shape))

    def read(self, name: str, box: Box) -> Tensor:
        """The entries of a tensor in ``box``, on the CPU; no others are read.

        Raises:
            UserError: a file cannot be read, or is no longer what it was.
        """
        return read_box(self.folder, self.entry(name), box, self.received)

    def entry(self, name: str) -> Entry:
        """Where a tensor lies."""
        return self._index[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor; its values are not read."""
        return self._index[name].shape


def published(root: Path) -> list[Path]:
    """Folders of published checkpoints, of the latest step first."""
    found = [p for p in root.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix(PREFIX))


def is_set_aside(folder: Path) -> bool:
    """Whether the run went back to an earlier step since: it is complete, but no newest one any more."""
    return (folder / SET_ASIDE).exists()


def peek(folder: Path) -> dict:
    """The state that a checkpoint records, unverified; empty where it cannot be read."""
    try:
        state = read_json(folder / STATE)
    except UserError:
        return {}
    return state if isinstance(state, dict) else {}


def newest_complete(root: Path) -> tuple[Path | None, list[str]]:
    """The folder of :func:`open_newest`, and the messages."""
    checkpoint, faults = open_newest(root)
    return None if checkpoint is None else checkpoint.folder, faults


def open_newest(root: Path, *, examine: Examine = examine) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that passes verification, and a message for every newer one that is damaged.

    Raises:
        UserError: a newer one may be complete, but this process or this version cannot read it: going on from
            an older one would in time replace it.
    """
    faults: list[str] = []
    for folder in published(root):
        if is_set_aside(folder):
            continue
        try:
            return Checkpoint(folder, examine=examine), faults
        except Damaged as fault:
            faults.append(str(fault))
    return None, faults


def by_loss(root: Path) -> list[Path]:
    """Published checkpoints with a validation loss on record, the lowest first and of equals the newest.

    Those alone whose loss is over as many tokens as that of the newest: losses over other tokens, as from
    before `--eval-iters` was changed, do not compare. What was set aside is not part of the run.
    """
    states = {folder: peek(folder) for folder in published(root) if not is_set_aside(folder)}
    judged = [f for f in states if type(states[f].get("validation_loss")) in (int, float)]
    tokens = {folder: states[folder].get("validation_tokens") for folder in judged}
    alike = [folder for folder in judged if tokens[folder] == tokens[judged[0]]]
    return sorted(alike, key=lambda folder: states[folder]["validation_loss"])


def best_complete(root: Path) -> tuple[Path | None, list[str]]:
    """The complete checkpoint with the lowest validation loss on record; where none has one the newest.
    None if no checkpoint is whole. With it a message for every better one that is damaged.

    Raises:
        UserError: one may be complete, but this process or this version cannot read it.
    """
    faults: list[str] = []
    for folder in by_loss(root):
        try:
            return Checkpoint(folder).folder, faults
        except Damaged as fault:
            faults.append(str(fault))
    folder, others = newest_complete(root)
    return folder, list(dict.fromkeys([*faults, *others]))
