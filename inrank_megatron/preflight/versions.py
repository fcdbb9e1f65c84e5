"""The same software on every host: Python, packages, CUDA, and the source of this project."""

import hashlib
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import inrank_megatron
import inrank_megatron_patches
from inrank_megatron.preflight.findings import ERROR, WARNING, Finding, HostFacts, unlike_the_others
from inrank_megatron.preflight.place import Place

SOURCE, PYTHON, DRIVER = "inrank-megatron", "Python", "NVIDIA driver"
# Those whose ranks would compute, draw or communicate otherwise; of the others it is worth a warning.
MUST_BE_ALIKE = (SOURCE, "torch", "CUDA", "NCCL", "deepspeed", "megatron-core", "numpy")
PACKAGES = (*MUST_BE_ALIKE[1:2], *MUST_BE_ALIKE[4:], "transformers", "tokenizers", "datasets", "safetensors")
ROWS = (SOURCE, PYTHON, *PACKAGES, "CUDA", "NCCL", DRIVER)
DRIVER_FILE = Path("/proc/driver/nvidia/version")


class Versions:
    """What is installed; hosts are compared with each other."""

    on_one_host = False

    def gather(self, place: Place) -> dict[str, Any]:
        found = {
            SOURCE: f"{inrank_megatron.__version__} {source_digest()}",
            PYTHON: platform.python_version(),
        }
        for package in PACKAGES:
            with suppress(PackageNotFoundError):
                found[package] = version(package)
        return found | _of_gpus(DRIVER_FILE)

    def judge(self, hosts: Sequence[HostFacts]) -> Iterator[Finding]:
        for row in ROWS:
            level = partial(_level, row)
            yield from unlike_the_others(
                hosts, row, _remedy(row), shown=lambda value: value or "none", level=level
            )

    def shown(self, row: str, value: Any) -> str:
        return value


def source_digest() -> str:
    """Of every file of the package and the patches, by its place and content."""
    digest = hashlib.sha256()
    for module in (inrank_megatron, inrank_megatron_patches):
        folder = Path(module.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _of_gpus(driver: Path) -> dict[str, str]:
    found = {}
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    if driver.exists() and (number := re.search(r"\b\d+\.\d+(\.\d+)?\b", driver.read_text())):
        found[DRIVER] = number[0]
    return found


def _level(row: str, value: str | None, usual: str | None) -> str:
    return ERROR if row in MUST_BE_ALIKE or _minor(row, value) != _minor(row, usual) else WARNING


def _minor(row: str, value: str | None) -> str | None:
    """Of Python: 3.11 of 3.11.2, whose compiled files and pickles differ from those of 3.12."""
    return value.rpartition(".")[0] if row == PYTHON and value else None


def _remedy(row: str) -> str:
    if row == SOURCE:
        return "give that host the same checkout or wheel (git status shows what was edited)"
    if row == DRIVER:
        return "install the same driver there"
    return "run launch/setup_env.sh there, or let the hosts share one environment"
