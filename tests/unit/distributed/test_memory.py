"""What control groups leave of the machine's memory, from trees of files as Linux has them."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from inrank_megatron.distributed.memory import available_memory

HOST = 10**12
UNLIMITED = 9223372036854771712  # as version 1 writes it


@pytest.fixture(autouse=True)
def host(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=HOST))


def tree(root: Path, groups: str, files: dict[str, dict[str, object]]) -> Path:
    """``proc/self/cgroup``, and for each folder below ``sys/fs/cgroup`` its files."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for folder, contents in files.items():
        (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, value in contents.items():
            (root / "sys/fs/cgroup" / folder / name).write_text(f"{value}\n")
    return root


def v2(limit: object, used: int, inactive: int) -> dict[str, object]:
    stat = f"anon 7\nfile 900\ninactive_file {inactive}\nactive_file 3"
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat}


def v1(limit: object, used: int, inactive: int) -> dict[str, object]:
    stat = f"cache 900\ninactive_file 1\ntotal_cache 900\ntotal_inactive_file {inactive}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


V1 = "5:cpu,cpuacct:/job\n4:memory:/job/task\n1:name=systemd:/\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/\n", {"": v2(5000, 3000, 700)}, 2700),
        ("0::/job/task\n", {"job/task": v2(5000, 3000, 700)}, 2700),
        ("0::/job/task\n", {"job": v2(4000, 3500, 0), "job/task": v2("max", 3000, 700)}, 500),
        ("0::/host/name\n", {"": v2(5000, 3000, 700)}, 2700),
        (V1, {"memory/job/task": v1(6000, 2000, 300)}, 4300),
        (V1, {"memory": v1(6000, 2000, 300)}, 4300),
        (V1, {"memory/job": v1(6000, 2000, 300), "memory/job/task": v1(UNLIMITED, 100, 0)}, 4300),
        ("0::/\n", {"": v2("max", 3000, 700)}, HOST),
        (V1, {"memory/job/task": v1(UNLIMITED, 2000, 300)}, HOST),
        ("0::/\n", {"": {}}, HOST),
        ("", {}, HOST),
    ],
    ids=[
        "v2",
        "v2 below",
        "v2 limit above",
        "v2 container by its outer name",
        "v1",
        "v1 container by its outer name",
        "v1 limit above",
        "v2 unlimited",
        "v1 unlimited",
        "v2 root group",
        "no groups",
    ],
)
def test_available_memory_is_the_smallest_limit(tmp_path, groups, files, left):
    assert available_memory(tree(tmp_path, groups, files)) == left


def test_available_memory_without_control_groups(tmp_path):
    assert available_memory(tmp_path) == HOST
