"""A rank, a host or a network that is lost ends the job everywhere in time, and is named."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from inrank_megatron.checkpoint.folder import published
from tests.cluster.hosts import DEVICE, Cluster, Host, need, wait_until
from tests.distributed import hanging
from tests.distributed.launches import PATIENCE, TINY, data_flags, last_step
from tests.forked import Forked
from tests.harness import PRETRAIN, ROOT

PROGRAM = Path(__file__).with_name("on_host.py")
PLACES = (0, 0, 1)  # the hosts of the ranks
SECONDS = int(os.environ.get("HANG_TIMEOUT_SECONDS", "8"))  # within which all ranks end
_WARNING = re.compile(r"^\[W.*\[c10d\].*\n", re.MULTILINE)  # torch, of a host without a name service
SPARE = 4.0  # for processes to be scheduled and reaped, on a machine that does other work too
SILENT = f"has not answered for {SECONDS / 2:g} s (last seen in step "


@dataclass
class Job:
    """Ranks on two hosts, each as its own launcher there would start it.

    Args:
        hang: of ``hanging.py``, by rank 2.
    """

    hosts: Cluster
    folder: Path
    hang: str | None = None
    ranks: list[Forked] = field(default_factory=list)

    def start(self) -> None:
        program = hanging.__file__ if self.hang else str(PRETRAIN)
        for rank, place in enumerate(PLACES):
            env = dict(os.environ)
            env |= {"RANK": str(rank), "WORLD_SIZE": str(len(PLACES)), "LOCAL_RANK": str(rank % 2)}
            env |= {"MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}
            env |= {hanging.HANG: self.hang or "", hanging.HANG_RANK: "2"}
            flags = [*TINY, "--global-batch-size", "6", "--train-iters", "5000", "--eval-interval", "5000"]
            flags += ["--hang-timeout-seconds", str(SECONDS), "--tensor-model-parallel-size", "1"]
            flags += [*data_flags(self.folder.parent / "data"), "--save", str(self.folder)]
            args = [str(self.hosts.hosts[place].first_pid), program, *flags]
            self.ranks.append(Forked(PROGRAM, args, num_procs=1, env=env, cwd=ROOT, port=0))

    def has_come_to(self, step: int) -> bool:
        ended = [rank.communicate()[1] for rank in self.ranks if rank.poll() is not None]
        assert not ended, ended
        return last_step(self.folder) >= step

    def process(self, rank: int) -> psutil.Process:
        return psutil.Process(self.ranks[rank].ranks[0].pid).children()[0]


@pytest.fixture
def job(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Job]:
    need("tc", "iptables")
    with Cluster(2, tmp_path) as hosts:
        job = Job(hosts, tmp_path / "run", getattr(request, "param", None))
        try:
            job.start()
            # Ranks say what they do every half a second: by then it is a step.
            begun = hanging.STEP - 1 if job.hang else 20
            wait_until(lambda: job.has_come_to(begun), "no step", seconds=PATIENCE)
            yield job
        finally:
            for rank in job.ranks:
                rank.kill()


def ends(job: Job, act: Callable[[], object], *, lost: int | None = None) -> list[str]:
    """``act`` in mid-run and wait; what each rank says, by its number. No process is left on any host.

    Every rank but the one ``lost`` ends in time with one line.
    """
    act()
    began = time.monotonic()
    statuses = [rank.wait(timeout=SECONDS + 30) for rank in job.ranks]
    seconds = time.monotonic() - began
    said = [_WARNING.sub("", rank.communicate()[1]) for rank in job.ranks]
    print(f"{seconds:.1f} s", *said, sep="\n")
    assert seconds < SECONDS + SPARE
    for rank, (status, stderr) in enumerate(zip(statuses, said, strict=True)):
        assert status != 0
        if rank != lost:
            assert stderr.startswith(f"rank {rank}: error: ") and stderr.count("\n") == 1, stderr
    for host in job.hosts.hosts:
        if host.is_there():
            wait_until(lambda host=host: host.processes() == [], host.processes, seconds=SPARE)
    return said


def test_pulled_cable_ends_every_rank_and_names_the_other_host(job):
    """Each host names the other."""
    for rank, told in enumerate(ends(job, lambda: job.hosts.hosts[1].set_cable("down"))):
        other = "node-1 (ranks 0, 1)" if PLACES[rank] else "node-2 (rank 2)"
        assert f"host {other} {SILENT}" in told


def test_vanished_host_ends_every_rank_and_is_named(job):
    """As one whose power fails: nothing says so on its network."""

    def vanish() -> None:
        job.hosts.hosts[1].set_cable("down")
        job.hosts.hosts[1].kill()

    for told in ends(job, vanish, lost=2)[:2]:
        assert f"host node-2 (rank 2) {SILENT}" in told


@pytest.mark.parametrize("lost", [0, 2])
def test_a_killed_process_is_named_on_both_hosts(job, lost):
    """The ranks of the other host see a victim's broken connection too, and must not blame the victim."""
    for rank, told in enumerate(ends(job, lambda: job.process(lost).kill(), lost=lost)):
        if rank != lost:
            assert f"rank {lost} on host node-{PLACES[lost] + 1} has ended (last seen in step " in told


def test_a_stopped_process_that_is_alone_on_its_host(job):
    stopped = job.process(2)
    *others, own = ends(job, stopped.suspend, lost=2)
    assert own.startswith(f"rank 2 on host node-2: error: it was stopped, or held up, for {SECONDS / 2:g} s")
    for told in others:
        assert re.search(r"rank 2 on host node-2 was stopped, .* has ended \(last seen in step \d+, ", told)


@pytest.mark.parametrize("job", ["spinning"], indirect=True)
def test_a_rank_that_hangs_on_the_other_host(job):
    said = ends(job, lambda: wait_until(lambda: job.has_come_to(hanging.STEP - 1), "no step", seconds=30))
    for told in said:
        doing = r"in step 6, spin \(\w+\.py:\d+\)"
        assert re.search(rf"rank 2 on host node-2 \({doing}\) makes no progress: ", told)


def loses(host: Host, share: float) -> None:
    """Of the packets that come in, at random."""
    rule = ["-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP"]
    host.run("iptables", "-F", "INPUT")
    host.run("iptables", "-A", "INPUT", "-i", DEVICE, *rule)


def sends(host: Host, rate: str) -> None:
    shape = ["tbf", "rate", rate, "burst", "3000", "limit", "1000000"]
    host.run("tc", "qdisc", "replace", "dev", DEVICE, "root", *shape)


@pytest.mark.parametrize(("fault", "little", "much"), [(loses, 0.02, 0.95), (sends, "20mbit", "8kbit")])
def test_a_bad_link_is_borne_until_it_is_too_bad(job, fault, little, much):
    host, step = job.hosts.hosts[1], last_step(job.folder)
    fault(host, little)
    wait_until(lambda: job.has_come_to(step + 10), "no steps", seconds=PATIENCE)
    for rank, told in enumerate(ends(job, lambda: fault(host, much))):
        assert "network" in told and f"node-{2 - PLACES[rank]}" in told


@pytest.mark.parametrize("places", [(1,), (0, 1)])
def test_a_disk_that_becomes_read_only(job, places):
    """As after a fault of the medium; ranks save because one is asked to stop."""
    for place in places:
        job.hosts.hosts[place].run("mount", "--bind", str(job.folder), str(job.folder))
        until = f"until mount -o remount,bind,ro {job.folder}; do :; done"  # no file is open for writing
        job.hosts.hosts[place].run("sh", "-c", until)
    said = ends(job, lambda: job.process(0).send_signal(signal.SIGUSR1))
    for told in (
        said[:1] if 0 in places else said
    ):  # rank 0 cannot write records either, and may end over them
        assert "Read-only file system" in told and "continue with --resume auto" in told


def test_a_host_that_is_told_to_end(job):
    """A batch system that takes one host away: all save, and the message says which host it was."""
    job.process(2).send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert [rank.wait(timeout=60) for rank in job.ranks] == [0, 0, 0]
    assert time.monotonic() - began < 60, "rank 0 writes a report before it ends"
    step = last_step(job.folder)
    assert f"stopping after step {step}: SIGTERM (rank 2 on host node-2)" in job.ranks[0].communicate()[0]
    [checkpoint] = published(job.folder / "checkpoints")
    assert checkpoint.name == f"step_{step:08d}"
    assert [host.processes() for host in job.hosts.hosts] == [[], []]
