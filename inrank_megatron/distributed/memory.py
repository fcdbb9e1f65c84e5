"""How much memory this process may still take: of the machine, of its container, under its own limit."""

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
"""Limit and use of a control group, and the page cache in its use that gives way to whoever needs memory."""


def available_memory(root: Path = Path("/")) -> int:
    """Bytes: the least of what the machine and the control groups of this process have left.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    return min([psutil.virtual_memory().available, *_left_in_groups(root), *_left_of_limit()])


def _left_of_limit() -> Iterator[int]:
    """What ``ulimit -v`` leaves of the process's addresses."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield max(0, limit - psutil.Process().memory_info().vms)


def _left_in_groups(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = mount, V2
        elif "memory" in controllers.split(","):
            top, names = mount / "memory", V1
        else:
            continue
        # A limit holds for all below it. In a container the own group may be the top, under a longer name.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if (left := _left(folder, *names)) is not None:
                yield left
            if folder == top:
                break


def _left(folder: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """None: the group has no limit, or is not there."""
    try:
        bound = (folder / limit).read_text().strip()
        if bound == "max":
            return None
        cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(bound) - (int((folder / used).read_text()) - int(cache[reclaimable]))
    except OSError:
        return None
