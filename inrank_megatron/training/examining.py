"""A checkpoint compared with its manifest by all ranks at once: each reads its share of the files."""

import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from inrank_megatron.checkpoint.index import Header, examine
from inrank_megatron.checkpoint.verify import MANIFEST, Damaged
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.distributed.side_group import SideGroup
from inrank_megatron.errors import UserError
from inrank_megatron.training.shared_folder import PATIENCE_SECONDS, appears

T = TypeVar("T")


class JobExaminer:
    """Rank 0 says which checkpoints are examined (:meth:`lead`), the others help (:meth:`serve`). Made on all
    ranks alike.

    Args:
        patience: seconds until a checkpoint that rank 0 sees has to be seen.
    """

    def __init__(self, parallel: Parallel, *, patience: float = PATIENCE_SECONDS):
        self._rank, self._size = parallel.rank, parallel.world_size
        self._side, self._patience = SideGroup(parallel), patience

    def lead(self, action: Callable[[], T]) -> T:
        """The result of ``action()``, which may examine any number of checkpoints by this object."""
        try:
            return action()
        finally:
            self._side.from_first(None)

    def serve(self) -> None:
        """Help rank 0 until its :meth:`lead` has ended."""
        while (task := self._side.from_first(None)) is not None:
            self._side.to_first(self._share(*task))

    def __call__(self, folder: Path, files: Mapping[str, dict], *, verify: bool = True) -> dict[str, Header]:
        """:func:`examine` by all ranks.

        Raises:
            Damaged: as there. UserError: a rank cannot read a file, or does not see the folder.
        """
        self._side.from_first((folder, files, verify))
        headers: dict[str, Header] = {}
        faults = []
        for outcome in self._side.to_first(self._share(folder, files, verify)):
            if isinstance(outcome, UserError):
                faults.append(outcome)
            else:
                headers |= outcome
        for fault in sorted(faults, key=lambda fault: isinstance(fault, Damaged)):
            raise fault
        return headers

    def _share(self, folder: Path, files: Mapping[str, dict], verify: bool) -> dict[str, Header] | UserError:
        if not appears(folder / MANIFEST, within=self._patience):
            return UserError(
                f"{folder}: rank {self._rank} on host {socket.gethostname()} does not see this checkpoint, "
                "and rank 0 does; give --save a folder that all hosts share"
            )
        try:
            own = {name: files[name] for name in share(files, self._rank, self._size)}
            return examine(folder, own, verify=verify)
        except UserError as fault:
            return fault


def share(files: Mapping[str, dict], index: int, count: int) -> Iterator[str]:
    """The files of the one with ``index`` of ``count``: neighbours by name, of about as many bytes for each.

    A rank that goes on as it saved so gets the file that it reads next.
    """
    total, before = sum(entry["bytes"] for entry in files.values()), 0
    for name in sorted(files):
        size = files[name]["bytes"]
        if (2 * before + size) * count // max(1, 2 * total) == index:
            yield name
        before += size
