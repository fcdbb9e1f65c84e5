"""The run folder is one and the same on all hosts: every rank writes its part of a checkpoint into it."""

import socket
from pathlib import Path

from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.errors import UserError
from inrank_megatron.preflight.folders import appears, mark

PATIENCE_SECONDS = 30.0  # NFS may know for so long of no new file in a folder


def check_shared(folder: Path, parallel: Parallel, *, patience: float = PATIENCE_SECONDS) -> None:
    """Every rank sees a file that rank 0 writes in ``folder``, which is there on rank 0. Collective.

    Raises:
        UserError: on all ranks; names a rank that does not, and its host.
    """
    marker = parallel.broadcast_from_rank_0(lambda: _mark(folder))
    seen = appears(folder / marker.name, within=patience)
    hosts = parallel.gather_from_all_ranks(None if seen else socket.gethostname())
    if parallel.rank == 0:
        marker.unlink(missing_ok=True)
    blind = [(rank, host) for rank, host in enumerate(hosts) if host is not None]
    if blind:
        rank, host = blind[0]
        more = f" (and {len(blind) - 1} more ranks)" if len(blind) > 1 else ""
        raise UserError(
            f"{folder}: rank {rank} on host {host}{more} does not see what rank 0 has written there, and "
            "every rank writes its part of a checkpoint; give --save a folder that all hosts share"
        )


def _mark(folder: Path) -> Path:
    try:
        return mark(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another --save") from None
