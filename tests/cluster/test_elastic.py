"""torchrun starts all ranks again when one is lost, from the newest checkpoint."""

import signal

import pytest

from tests.cluster.hosts import Host, wait_until
from tests.cluster.trainings import SECONDS, flags, result, started
from tests.distributed.launches import last_step


def kill_rank(host: Host) -> None:
    [pid, *_] = host.run("pgrep", "-f", "python.* -u launch/pretrain_gpt2.py").split()
    host.run("kill", f"-{signal.SIGKILL.value}", pid)


def test_a_killed_rank_is_started_again_and_all_with_it(cluster, trainings, one_host):
    folder = trainings / "elastic"
    with started(cluster, "torchrun_elastic.sh", flags(folder)) as launch:
        wait_until(lambda: last_step(folder) >= 10, launch.text, seconds=SECONDS)
        kill_rank(cluster.hosts[1])
        assert not any(launch.wait()), launch.text()
        told = launch.text()
    assert "resumed at step 8 in" in told
    assert result(folder) == one_host


def test_training_goes_on_without_a_host(cluster, trainings, one_host):
    """On half of the ranks, from the newest checkpoint: other sums of gradients, so equal up to rounding."""
    folder = trainings / "fewer"
    environment = {"NODES": "1:2"}
    with started(cluster, "torchrun_elastic.sh", flags(folder), env=environment) as launch:
        wait_until(lambda: last_step(folder) >= 10, launch.text, seconds=SECONDS)
        cluster.hosts[1].run("pkill", "-KILL", "-f", "torchrun|launch/pretrain_gpt2.py")
        assert launch.commands[0].wait(timeout=SECONDS) == 0, launch.text()
        told = launch.text()
    assert "2 x cpu = 2 tensor-parallel x 1 data-parallel" in told
    assert "resumed at step 8 in" in told
    losses = [[record[1] for record in run["train"]] for run in (result(folder), one_host)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
