"""The harness itself: it must fail where a rank fails."""

import os
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.conftest import pytest_configure
from tests.forked import run_forked
from tests.harness import RankError, run_ranks


def _sum_of_ranks(rank: int, world_size: int, weight: float) -> torch.Tensor:
    total = torch.tensor([weight * (rank + 1)])
    dist.all_reduce(total)
    return total


def _fail_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the one that failed")
    dist.barrier()


def _sleep(rank: int, world_size: int) -> None:
    time.sleep(60)


def test_gpus_that_a_batch_system_offers_are_hidden(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    pytest_configure(SimpleNamespace(workerinput={}))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def test_results_come_back_in_rank_order():
    assert [total.item() for total in run_ranks(_sum_of_ranks, 2, 0.5)] == [1.5, 1.5]


def test_failing_rank_is_raised_here_and_the_next_call_works():
    with pytest.raises(RankError, match=r"rank 1 of 2 raised(.|\n)*the one that failed"):
        run_ranks(_fail_on_rank_1, 2)
    assert run_ranks(_sum_of_ranks, 2, 1.0)[0].item() == 3.0


def test_silent_ranks_end_at_the_time_limit():
    with pytest.raises(RankError, match=r"ranks \[0, 1\] gave no answer in 1 s"):
        run_ranks(_sleep, 2, timeout=1)


def test_a_fork_is_a_program_of_its_own(tmp_path, monkeypatch):
    """Its name, arguments, environment, standard output and status, and nothing of the fork before."""
    script = tmp_path / "program.py"
    script.write_text(
        "import os, sys\n"
        "print(__name__, *sys.argv[1:], os.environ['FOR_FORKS'], hasattr(sys, 'left'), flush=True)\n"
        "sys.left = True\n"
        "if sys.argv[1] == 'kill': os.kill(os.getpid(), 9)\n"
        "sys.exit(sys.argv[1])\n"
    )
    for word, status, stderr in [("a fault", 1, "a fault\n"), ("kill", -9, "")]:
        monkeypatch.setenv("FOR_FORKS", word.upper())
        ended = run_forked(script, word)
        assert (ended.returncode, ended.stderr) == (status, stderr)
        assert ended.stdout == f"__main__ {word} {word.upper()} False\n"
