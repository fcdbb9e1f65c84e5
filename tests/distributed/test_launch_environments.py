"""Real ranks that know nothing but what a batch system or MPI sets."""

import os
import signal
import time
from pathlib import Path

import pytest

from inrank_megatron.training.run_place import NAMES
from tests.distributed.launches import PATIENCE, TINY, data_flags, last_step
from tests.forked import Forked
from tests.harness import PRETRAIN, ROOT, free_port


def slurm(rank: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def open_mpi(rank: int) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "PMIX_NAMESPACE": str(os.getpid()),
    }


def torch_names(rank: int, **others: str) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} | others


def ranks(folder: Path, envs: list[dict[str, str]], flags: list[list[str]] | None = None) -> list[Forked]:
    """Two processes, each with its environment and flags."""
    run = [*TINY, "--switch-iters", "5", "--eval-interval", "2000", "--save-interval", "2000"]
    run += [*data_flags(folder.parent / "data"), "--save", str(folder)]
    return [
        Forked(PRETRAIN, [*run, *own], num_procs=1, env=os.environ | env, cwd=ROOT, port=0)
        for env, own in zip(envs, flags or [["--train-iters", "2000"]] * 2, strict=True)
    ]


def ends(started: list[Forked]) -> list[tuple[int, str, str]]:
    """Status, output and errors of each."""
    try:
        return [(rank.wait(timeout=PATIENCE), *rank.communicate()) for rank in started]
    finally:
        for rank in started:
            rank.kill()


@pytest.mark.parametrize(
    ("variables", "warning"), [(slurm, signal.SIGUSR1), (open_mpi, signal.SIGUSR2)], ids=["srun", "mpirun"]
)
def test_ranks_of_another_launcher_train_together_and_stop_when_warned(tmp_path, variables, warning):
    """Before, each of them believed it was alone, all wrote one folder, and the warning ended them unsaved.

    The log is the user's own, which the shell opens in the run's folder before the program starts.
    """
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.txt").write_text("mine")
    started = ranks(folder, [variables(0), variables(1)])
    try:
        while last_step(folder) < 6:  # in the second phase
            assert [rank.poll() for rank in started] == [None, None], ends(started)
            time.sleep(0.05)  # the ranks are on this core
    finally:
        for rank in started:
            os.kill(rank.ranks[0].pid, warning)
    (status, output, errors), (other, silent, _) = ends(started)
    assert (status, other) == (0, 0), errors
    step = last_step(folder)
    assert f"stopping after step {step}: {warning.name}" in output and "2 x cpu" in output and silent == ""
    assert "holds log.txt, which the run leaves alone" in output
    assert (folder / "checkpoints" / f"step_{step:08d}").is_dir()
    written = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    assert written <= NAMES | {"log.txt"} and (folder / "log.txt").read_text() == "mine"


def test_ranks_of_different_jobs_are_refused(tmp_path):
    """A process group of them would hang until its timeout."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    envs = [torch_names(0, **place), torch_names(1, **place)]
    flags = [["--train-iters", "20", "--lr", lr] for lr in ("0.001", "0.002")]
    (first, _, errors), (second, _, other) = ends(ranks(tmp_path / "run", envs, flags))
    assert first == second == 1 and not (tmp_path / "run").exists()
    assert "rank 0: error: rank 1 on host" in errors and "other settings than rank 0" in errors
    assert "rank 1: error: lr 0.002 here, 0.001 on rank 0" in other


def test_ranks_with_another_world_size_are_refused(tmp_path):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    envs = [torch_names(0, **place), torch_names(1, **place) | {"WORLD_SIZE": "4"}]
    (first, _, errors), (second, _, other) = ends(ranks(tmp_path / "run", envs))
    assert first == second == 1 and not (tmp_path / "run").exists()
    assert "WORLD_SIZE = 2 on rank 0, and 4 on rank 1" in errors
    assert "WORLD_SIZE = 4 on rank 1, and 2 on rank 0" in other
