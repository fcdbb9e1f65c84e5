"""A pulled cable, a host that vanishes and a killed process end the job everywhere, and are named."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import Cluster, need, wait_until
from tests.distributed.launches import PATIENCE, TINY, data_flags, last_step
from tests.forked import Forked
from tests.harness import ROOT

PROGRAM = Path(__file__).with_name("on_host.py")
PLACES = (0, 0, 1)  # the hosts of the ranks


@dataclass
class Job:
    """Ranks on two hosts, each as its own launcher there would start it."""

    hosts: Cluster
    folder: Path
    ranks: list[Forked] = field(default_factory=list)

    def start(self) -> None:
        for rank, place in enumerate(PLACES):
            env = dict(os.environ)
            env |= {"RANK": str(rank), "WORLD_SIZE": str(len(PLACES)), "LOCAL_RANK": str(rank % 2)}
            env |= {"MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}
            flags = [*TINY, "--global-batch-size", "6", "--train-iters", "5000", "--eval-interval", "5000"]
            flags += [*data_flags(self.folder.parent / "data"), "--save", str(self.folder)]
            args = [str(self.hosts.hosts[place].first_pid), *flags]
            self.ranks.append(Forked(PROGRAM, args, num_procs=1, env=env, cwd=ROOT, port=0))

    def training(self) -> bool:
        ended = [rank.communicate()[1] for rank in self.ranks if rank.poll() is not None]
        assert not ended, ended
        return last_step(self.folder) >= 4

    def process(self, rank: int) -> psutil.Process:
        return psutil.Process(self.ranks[rank].ranks[0].pid).children()[0]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    need()
    with Cluster(2, tmp_path) as hosts:
        job = Job(hosts, tmp_path / "run")
        try:
            job.start()
            wait_until(job.training, "no step", seconds=PATIENCE)
            yield job
        finally:
            for rank in job.ranks:
                rank.kill()


def ends(job: Job, act: Callable[[], object]) -> tuple[list[tuple[int, str]], float]:
    """``act`` in mid-run and wait; status and errors of each rank, and the seconds."""
    act()
    began = time.monotonic()
    statuses = [rank.wait(timeout=60) for rank in job.ranks]
    seconds = time.monotonic() - began
    return [
        (status, rank.communicate()[1]) for status, rank in zip(statuses, job.ranks, strict=True)
    ], seconds


def test_pulled_cable_ends_every_rank_and_names_the_other_host(job):
    """Each host names the other, within the time that a host may be silent and a few seconds."""
    found, seconds = ends(job, lambda: job.hosts.hosts[1].set_cable("down"))
    assert seconds < 20
    for rank, (status, stderr) in enumerate(found):
        other = "node-1 (ranks 0, 1)" if PLACES[rank] else "node-2 (rank 2)"
        assert status == 1 and "Traceback" not in stderr
        assert f"rank {rank}: error: host {other} has not answered for 6 s" in stderr
        assert stderr.count("error:") == 1


def test_vanished_host_ends_every_rank_and_is_named(job):
    """As one whose power fails: nothing says so on its network."""

    def vanish() -> None:
        job.hosts.hosts[1].set_cable("down")
        job.hosts.hosts[1].kill()

    found, seconds = ends(job, vanish)
    assert seconds < 20
    for rank, (status, stderr) in enumerate(found[:2]):
        assert status == 1 and "Traceback" not in stderr
        assert f"rank {rank}: error: host node-2 (rank 2) has not answered for 6 s" in stderr
        assert stderr.count("error:") == 1


@pytest.mark.parametrize("lost", [0, 2])
def test_a_killed_process_is_named_on_both_hosts(job, lost):
    """The ranks of the other host see a victim's broken connection too, and must not blame the victim."""
    found, seconds = ends(job, lambda: job.process(lost).kill())
    assert seconds < 15
    for rank, (status, stderr) in enumerate(found):
        assert status != 0
        if rank != lost:
            assert f"rank {rank}: error: rank {lost} on host node-{PLACES[lost] + 1} has ended" in stderr
            assert stderr.count("error:") == 1 and "Traceback" not in stderr
