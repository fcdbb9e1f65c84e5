"""The run folder is one and the same on all hosts, or each has its own: every rank writes into it."""

import socket
from collections.abc import Sequence
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
            "every rank writes its part of a checkpoint; give --save a folder that all hosts share, or "
            "--use-node-local-storage"
        )


def check_unshared(folder: Path, parallel: Parallel, leaders: Sequence[int]) -> str:
    """No host sees what another has written in ``folder``, which is there on each. Collective.

    Args:
        leaders: of each rank, the first one on its host.

    Returns:
        What to say of such a run.

    Raises:
        UserError: on all ranks; names two hosts that share the folder.
    """
    leads = leaders[parallel.rank] == parallel.rank
    marker = parallel.call_or_raise_on_all_ranks(lambda: _mark(folder) if leads else None)
    markers = parallel.gather_from_all_ranks(marker and marker.name)  # then all of them are there
    others = {rank: name for rank, name in enumerate(markers) if name and rank != parallel.rank}
    seen = [rank for rank, name in others.items() if leads and (folder / name).exists()]
    hosts, found = parallel.gather_from_all_ranks(socket.gethostname()), parallel.gather_from_all_ranks(seen)
    pairs = [(rank, other) for rank, shared in enumerate(found) for other in shared]
    if marker is not None:
        marker.unlink()
    if pairs:
        first, second = pairs[0]
        raise UserError(
            f"{folder}: is one and the same on hosts {hosts[first]} and {hosts[second]}, and with "
            "--use-node-local-storage each host needs its own; drop that flag"
        )
    return (
        f"each host keeps its own part of a checkpoint in {folder}; the records are on host {hosts[0]}: "
        "continue with rank 0 there"
    )


def _mark(folder: Path) -> Path:
    try:
        return mark(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another --save") from None
