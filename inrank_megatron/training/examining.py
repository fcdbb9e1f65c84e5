"""A checkpoint compared with its manifest by all ranks at once: each reads its share of the files."""

import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from inrank_megatron.checkpoint.index import Header, examine
from inrank_megatron.checkpoint.verify import MANIFEST, Damaged, size_of
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.distributed.side_group import SideGroup
from inrank_megatron.errors import UserError
from inrank_megatron.preflight.folders import appears
from inrank_megatron.training.shared_folder import PATIENCE_SECONDS

T = TypeVar("T")
Leaders = tuple[int, ...]
"""Of each rank, the first one on its host, where hosts do not share the run folder."""


class Share(NamedTuple):
    """Files that a rank has found to be what the manifest says, and what the tensor files among them have."""

    files: list[str]
    headers: dict[str, Header]


class JobExaminer:
    """Rank 0 says which checkpoints are examined (:meth:`lead`), the others help (:meth:`serve`). Made on all
    ranks alike.

    Args:
        leaders: None where all ranks see one folder.
        patience: seconds until a checkpoint that rank 0 sees has to be seen.

    Attributes:
        holders: of each file of the checkpoint that was examined last, one rank of each host that has it; on
            rank 0.
    """

    def __init__(
        self,
        parallel: Parallel,
        side: SideGroup,
        leaders: Leaders | None,
        *,
        patience: float = PATIENCE_SECONDS,
    ):
        self._rank, self._size = parallel.rank, parallel.world_size
        self._side, self._leaders, self._patience = side, leaders, patience
        self.holders: dict[str, list[int]] = {}

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
            Damaged: as there; a file may also be on no host. UserError: a rank cannot read a file, or does
                not see the folder.
        """
        self._side.from_first((folder, files, verify))
        shares, faults = {}, []
        for rank, outcome in enumerate(self._side.to_first(self._share(folder, files, verify))):
            if isinstance(outcome, UserError):
                faults.append(outcome)
            else:
                shares[rank] = outcome
        for fault in sorted(faults, key=lambda fault: isinstance(fault, Damaged)):
            raise fault
        self.holders = {name: [rank for rank in shares if name in shares[rank].files] for name in files}
        if missing := [name for name in files if not self.holders[name]]:
            raise Damaged(_missing(folder, files, missing))
        return {file: header for share in shares.values() for file, header in share.headers.items()}

    def _share(self, folder: Path, files: Mapping[str, dict], verify: bool) -> Share | UserError:
        index, count = self._rank, self._size
        if self._leaders is not None:
            peers = [rank for rank in range(count) if self._leaders[rank] == self._leaders[self._rank]]
            index, count = peers.index(self._rank), len(peers)
            files = {name: entry for name, entry in files.items() if size_of(folder / name) is not None}
        elif not appears(folder / MANIFEST, within=self._patience):
            return UserError(
                f"{folder}: rank {self._rank} on host {socket.gethostname()} does not see this checkpoint, "
                "and rank 0 does; give --save a folder that all hosts share, or --use-node-local-storage"
            )
        own = {name: files[name] for name in share(files, index, count)}
        try:
            return Share(list(own), examine(folder, own, verify=verify))
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


def _missing(folder: Path, files: Mapping[str, dict], names: list[str]) -> str:
    hosts = sorted({files[name]["host"] for name in names if "host" in files[name]})
    written = f", written on {', '.join(hosts)}" if hosts else ""
    more = f" (and {len(names) - 1} more files)" if len(names) > 1 else ""
    return (
        f"{folder / names[0]}{more}{written}: on no host of this job; start it on the hosts that have the "
        "files, or copy them into this folder"
    )
