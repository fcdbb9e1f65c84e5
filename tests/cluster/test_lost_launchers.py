"""A launcher that is killed leaves nothing behind: its ranks on every host save and end."""

import pytest

from tests.cluster.hosts import wait_until
from tests.cluster.trainings import SECONDS, flags, started
from tests.distributed.launches import last_step

RUNS_ON = ["--train-iters", "5000", "--eval-interval", "5000", "--save-interval", "5000"]


@pytest.mark.parametrize(
    ("recipe", "killed"),
    [("deepspeed_pdsh.sh", "pdsh|ssh"), ("deepspeed_openssh.sh", "ssh"), ("open_mpi.sh", "mpirun")],
)
def test_no_rank_outlives_a_killed_launcher(cluster, trainings, recipe, killed):
    """By SIGKILL, of which no launcher can tell its ranks anything."""
    folder, first = trainings / f"killed-{recipe}", cluster.hosts[0]

    def running() -> list[str]:
        return [f"{host.name}: {line}" for host in cluster.hosts for line in host.processes()]

    before = running()
    with started(cluster, recipe, flags(folder, *RUNS_ON)) as launch:
        wait_until(lambda: last_step(folder) >= 3, launch.text, seconds=SECONDS)
        first.run("pkill", "-KILL", "-x", killed)
        launch.wait()
    wait_until(lambda: running() == before, lambda: "\n".join(running()), seconds=60)
    if recipe != "open_mpi.sh":  # whose daemons end their ranks by force
        [checkpoint] = (folder / "checkpoints").iterdir()
        assert checkpoint.name == f"step_{last_step(folder):08d}"
