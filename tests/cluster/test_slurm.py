"""What Slurm sends ahead of a time limit: the run saves, the job returns to the queue and goes on."""

import json
from pathlib import Path

import pytest

from tests.cluster.hosts import wait_until
from tests.cluster.trainings import RECIPES, SECONDS, flags, result, started
from tests.distributed.launches import last_step


def is_finished(folder: Path) -> bool:
    file = folder / "summary.json"
    return file.exists() and json.loads(file.read_text())["finished"]


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("slurm*")))
def test_a_warned_job_saves_and_goes_on(cluster, trainings, one_host, recipe):
    """The signal comes by hand: Slurm's own comes up to a minute too early, and limits are in minutes."""
    folder, first = trainings / recipe, cluster.hosts[0]
    with started(cluster, recipe, flags(folder)) as launch:
        wait_until(lambda: last_step(folder) >= 3, launch.text, seconds=SECONDS)
        [job] = first.run("squeue", "-h", "-o", "%A").split()
        first.run("scancel", "--batch", "--signal=USR1", job)
        wait_until(lambda: is_finished(folder), launch.text, seconds=SECONDS)
        wait_until(lambda: not first.run("squeue", "-h"), launch.text, seconds=60)
        told = launch.text()
    assert "stopping after step" in told and ": SIGUSR1" in told and "resumed at step" in told
    assert f"restarts={1}" in first.run("scontrol", "show", "job", job).lower()
    assert result(folder) == one_host
