"""What every test gets: one thread per process, no network, no GPU, caches of its own."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = Path(__file__).resolve().parent / "include"


def pytest_configure(config: pytest.Config) -> None:
    """Set what libraries read at import; the ranks that tests start inherit it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("MPLBACKEND", "Agg")
    # The patches for runs without CUDA are tested too, and a rank per process must not need a device each.
    # Where a batch system's or a container's value stays, ranks of gloo meet Megatron without the patches.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not hasattr(config, "workerinput"):
        # What one worker compiles (DeepSpeed's CPU Adam) the others share; they inherit it from here. It
        # takes three minutes with the optimisation that DeepSpeed asks for and all of torch's headers, else
        # 15 s.
        folder = Path(tempfile.mkdtemp(prefix="torch-extensions-"))
        compiler = folder / "g++"
        compiler.write_text(f'#!/bin/sh\nexec c++ "-I{INCLUDE}" "$@" -O1 -g0\n')
        compiler.chmod(0o755)
        os.environ |= {"TORCH_EXTENSIONS_DIR": str(folder), "CXX": str(compiler)}


@pytest.fixture(scope="session", autouse=True)
def _share_of_cores() -> None:
    """Keep a worker and all that it starts on its own cores: ranks that pass messages wake each other up in
    a tenth of the time on one core, and two workers do not wait for each other.

    There a woken thread must not interrupt the one that woke it (SCHED_BATCH). gloo's thread that receives
    spins while another that was interrupted holds its lock: an all-reduce of four ranks then takes five
    times as much of the core.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        number, workers = (os.environ[f"PYTEST_XDIST_WORKER{name}"] for name in ("", "_COUNT"))
        cores = sorted(os.sched_getaffinity(0))[int(number.removeprefix("gw")) :: int(workers)]
        if cores:
            os.sched_setaffinity(0, cores)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what was compiled."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["TORCH_EXTENSIONS_DIR"])


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what libraries cache out of the home folder."""
    cache = tmp_path_factory.mktemp("cache")
    for name, folder in {
        "HF_HOME": "huggingface",
        "MPLCONFIGDIR": "matplotlib",
        "TRITON_CACHE_DIR": "triton",
    }.items():
        os.environ[name] = str(cache / folder)


@pytest.fixture(scope="module", autouse=True)
def _no_job_is_left() -> Iterator[None]:
    """What the tests of a file start in their own process ends with the file: a job of one rank (a converter
    computes with the model), and the variables by which it was started.
    """
    before = dict(os.environ)
    yield
    if "inrank_megatron.distributed.process_groups" in sys.modules:
        sys.modules["inrank_megatron.distributed.process_groups"].shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def _rank_pools() -> Iterator[None]:
    """End the ranks that tests left waiting for work."""
    from tests.harness import close_pools

    yield
    close_pools()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real corpora and tokenizers next to the checkout; without it the test is skipped."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real corpora are absent: there is no folder {folder}")
    return folder
