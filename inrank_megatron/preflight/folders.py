"""The run folder is one and the same on all hosts, or with ``--use-node-local-storage`` each host has its
own; of the folder of token files it is said whether it is shared.
"""

import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from inrank_megatron.preflight.findings import ERROR, Finding, HostFacts
from inrank_megatron.preflight.place import Place, cache_folder, nearest_folder, run_folder

SAVE, CACHE = "run folder", "token files"
SHARED, OWN, READ_ONLY = "shared", "of its own", "cannot be written"
PATIENCE_SECONDS = 10.0  # a name that nobody has looked for before is asked of the server, also by NFS


class Folders:
    """Rank 0's host writes a file, which every other looks for."""

    on_one_host = False

    def gather(self, place: Place) -> dict[str, Any]:
        if len(place.hosts) == 1:
            return {}
        folders = {
            SAVE: run_folder(place.config),
            CACHE: cache_folder(place.config),
        }
        folders = {row: path.absolute() for row, path in folders.items()}
        marks = {row: _try_to_mark(path) for row, path in folders.items()} if place.number == 0 else {}
        try:
            states = _looked_for(place, folders, marks)
        finally:  # also if a host does not answer
            for mark in filter(None, marks.values()):
                mark.unlink(missing_ok=True)
        needed = OWN if place.config.training.use_node_local_storage and place.number > 0 else SHARED
        return {
            row: {"path": str(path), "state": states[row], "needed": needed} for row, path in folders.items()
        }

    def judge(self, hosts: Sequence[HostFacts]) -> Iterator[Finding]:
        for host in hosts if len(hosts) > 1 else ():
            fact = host.facts[SAVE]
            if (state := fact["state"]) == fact["needed"]:
                continue
            rule, first = "every rank writes its part of a checkpoint there", hosts[0].host
            remedy = "give --save a folder that all hosts share and can write, or --use-node-local-storage"
            if state == OWN:
                rule = f"it does not see what host {first} writes, and {rule}"
            elif state == SHARED:
                rule = (
                    f"it is that of host {first}, and with --use-node-local-storage each host needs its own"
                )
                remedy = "drop that flag"
            yield Finding(ERROR, SAVE, host.host, host.texts[SAVE], rule, remedy)

    def shown(self, row: str, value: Any) -> str:
        return f"{value['path']} {value['state']}"


def mark(folder: Path) -> Path:
    """A new file in the folder, with a name that nobody has looked for. Raises OSError."""
    path = folder / f".seen_by_all_{uuid.uuid4().hex}"
    path.touch()
    return path


def appears(path: Path, *, within: float) -> bool:
    """Whether the file is there, or comes within so many seconds."""
    deadline = time.monotonic() + within
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
    return True


def _try_to_mark(folder: Path) -> Path | None:
    try:
        return mark(nearest_folder(folder))
    except OSError:
        return None


def _looked_for(
    place: Place, folders: Mapping[str, Path], marks: Mapping[str, Path | None]
) -> dict[str, str]:
    """By row, what of each folder holds here: whether rank 0's host has written what is found."""
    # Where hosts have the checkout in different places, a relative path leads to different ones.
    own = {row: [_missing(folders[row]), mark.name] for row, mark in marks.items() if mark}
    written = place.exchange("a file in the shared folders", own)[0]
    waits = not place.config.training.use_node_local_storage
    states = {
        row: _seen(path, written.get(row), within=PATIENCE_SECONDS if row == SAVE and waits else 0)
        for row, path in folders.items()
    }
    place.exchange("a look at the shared folders", None)
    return states


def _missing(path: Path) -> int:
    """How many folders at its end are not there yet."""
    return len(path.parts) - len(nearest_folder(path).parts)


def _seen(folder: Path, written: list | None, *, within: float) -> str:
    """What of the folder holds here.

    Args:
        written: how many folders above it rank 0's host has written, and the name; None if it could not.
    """
    if written is None or not os.access(nearest_folder(folder), os.W_OK | os.X_OK):
        return READ_ONLY
    above, name = written
    return SHARED if appears([folder, *folder.parents][above] / name, within=within) else OWN
