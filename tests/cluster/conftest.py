"""The cluster that all tests share, and the training that they compare with."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import PROGRAMS, Cluster, need
from tests.cluster.services import slurm_files, ssh_files, start_slurm, start_ssh
from tests.cluster.trainings import result, run

# Of tests/conftest.py, for processes that sshd starts.
_INHERITED = (
    *("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "MPLBACKEND", "CUDA_VISIBLE_DEVICES", "TORCH_EXTENSIONS_DIR"),
    *("CXX", "HF_HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR"),
)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, _caches: None) -> Iterator[Cluster]:
    """Four hosts with sshd and Slurm; most tests use two."""
    need(*PROGRAMS)
    folder = tmp_path_factory.mktemp("cluster")
    environment = {name: os.environ[name] for name in _INHERITED}
    mounts = {
        ssh_files(folder / "ssh", environment): "/etc/ssh",
        slurm_files(folder / "slurm", 4): "/etc/slurm",
    }
    with Cluster(4, folder, mounts=mounts) as hosts:
        start_ssh(hosts)
        start_slurm(hosts)
        yield hosts


@pytest.fixture(scope="session")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where run folders lie, next to the corpus that they share."""
    return tmp_path_factory.mktemp("trainings")


@pytest.fixture(scope="session")
def one_host(cluster: Cluster, trainings: Path) -> dict:
    """The result of the training with the same layout on one host."""
    run(cluster, "torchrun_static.sh", trainings / "one_host", hosts=1, slots=4)
    return result(trainings / "one_host")
