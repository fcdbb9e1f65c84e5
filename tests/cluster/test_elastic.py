"""torchrun starts all ranks again when one is lost, from the newest checkpoint."""

import signal

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
