"""Random faults, one after another, in a job of several hosts; it must end as the undisturbed run does.

    bash tests/soak.sh [FAULTS] [SEED] [ROWS]    60 on two hosts, then as many on four, unless asked otherwise

After each fault all ranks that are left must end by themselves, in time, with one line that names what was
lost. What is broken is repaired, and the same command goes on from the newest checkpoint.
"""

import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.cluster.hosts import DEVICE, Cluster, Host, wait_until
from tests.distributed.launches import TINY, course, data_flags, last_step
from tests.distributed.test_run_kills import expected_start
from tests.forked import Forked
from tests.harness import PRETRAIN, ROOT

PROGRAM = Path(__file__).with_name("on_host.py")
HANG_SECONDS = 20  # of the setting
SECONDS_TO_END = HANG_SECONDS + 15  # and of processes that wait for a core
SECONDS_TO_TRAIN = 240
SAVE_INTERVAL = 5
STEPS_PER_FAULT = 12
LAST_STEPS = 60  # without a fault, so that none comes after the end
DISK = "64m"
_WARNING = re.compile(r"^\[W.*\[c10d\].*\n", re.MULTILINE)  # torch, of a host without a name service
FIGURES = ("steps_lost", "seconds_to_end", "seconds_to_recover")


class Layout(NamedTuple):
    hosts: int
    ranks_of_host: int
    flags: tuple[str, ...]

    @property
    def ranks(self) -> int:
        return self.hosts * self.ranks_of_host


LAYOUTS = [
    Layout(2, 2, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
    Layout(4, 1, ("--tensor-model-parallel-size", "1", "--zero-stage", "2")),
]


class Job:
    """All ranks, each as the launcher of its host would start it."""

    def __init__(self, cluster: Cluster, layout: Layout, flags: list[str], *, on_one_host: bool = False):
        self.cluster, self.layout = cluster, layout
        self.ranks = []
        port = str(random.randrange(20000, 30000))
        for rank in range(layout.ranks):
            env = dict(os.environ)
            env |= {"RANK": str(rank), "WORLD_SIZE": str(layout.ranks), "MASTER_PORT": port}
            env |= {"LOCAL_RANK": str(rank if on_one_host else rank % layout.ranks_of_host)}
            env |= {"MASTER_ADDR": "node-1"}
            host = cluster.hosts[0] if on_one_host else self.host(rank)
            args = [str(host.first_pid), str(PRETRAIN), *flags]
            self.ranks.append(Forked(PROGRAM, args, num_procs=1, env=env, cwd=ROOT, port=0))

    def host(self, rank: int) -> Host:
        return self.cluster.hosts[rank // self.layout.ranks_of_host]

    def process(self, rank: int) -> psutil.Process:
        return psutil.Process(self.ranks[rank].ranks[0].pid).children()[0]

    def neighbours(self, rank: int) -> list[int]:
        """All ranks of its host."""
        first = rank - rank % self.layout.ranks_of_host
        return list(range(first, first + self.layout.ranks_of_host))

    def ended(self) -> bool:
        return any(rank.poll() is not None for rank in self.ranks)

    def wait(self, seconds: float) -> list[int]:
        """The statuses; the deadline is one for all."""
        deadline = time.monotonic() + seconds
        return [rank.wait(max(0.1, deadline - time.monotonic())) for rank in self.ranks]

    def said(self, rank: int) -> tuple[str, str]:
        return self.ranks[rank].communicate()

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()


@dataclass(frozen=True)
class Fault:
    """``act`` breaks, ``repair`` mends; ``names``: what a rank that is left must say, given the rank that is
    hit; None for a stop that all ranks agree on and that ends well.
    """

    act: Callable[[Job, int], object]
    names: Callable[[Job, int], str] | None
    repair: Callable[[Job, int], object] = lambda job, rank: None
    hits: Callable[[Job, int], list[int]] = lambda job, rank: []  # ranks that cannot say anything


def _rank(job: Job, rank: int) -> str:
    return f"rank {rank} on host {job.host(rank).name}"


def _host(job: Job, rank: int) -> str:
    return f"host {job.host(rank).name} (rank"


def _signal(*names: str) -> Callable[[Job, int], None]:
    def act(job: Job, rank: int) -> None:
        for name in names:
            job.process(rank).send_signal(signal.Signals[name])

    return act


def _to_ranks(which: Callable[[Job, int], list[int]]) -> Callable[[Job, int], None]:
    def act(job: Job, rank: int) -> None:
        for other in which(job, rank):
            job.process(other).terminate()

    return act


def _vanish(job: Job, rank: int) -> None:
    job.host(rank).set_cable("down")
    job.host(rank).kill()


def _replace(job: Job, rank: int) -> None:
    job.cluster.replace(rank // job.layout.ranks_of_host)


def _drop(probability: float) -> Callable[[Job, int], None]:
    """Of the packets that the host is sent, this share is lost."""

    def act(job: Job, rank: int) -> None:
        match = f"-m statistic --mode random --probability {probability:g}" if probability < 1 else ""
        job.host(rank).run(*f"iptables -A INPUT -i {DEVICE} {match} -j DROP".split())

    return act


def _drop_no_more(job: Job, rank: int) -> None:
    job.host(rank).run("iptables", "-F", "INPUT")


def _fill(job: Job, rank: int) -> None:
    subprocess.run(["dd", "if=/dev/zero", f"of={_ballast(job)}", "bs=64k"], capture_output=True, check=False)


def _ballast(job: Job) -> Path:
    return job.cluster.folder / "disk" / "ballast"


ALL = {
    "rank killed": Fault(_signal("SIGKILL"), _rank, hits=lambda job, rank: [rank]),
    "rank stopped": Fault(_signal("SIGSTOP"), _rank, hits=lambda job, rank: [rank]),
    "host vanished": Fault(_vanish, _host, repair=_replace, hits=Job.neighbours),
    "cable pulled": Fault(
        lambda job, rank: job.host(rank).set_cable("down"),
        lambda job, rank: "has not answered",
        repair=lambda job, rank: job.host(rank).set_cable("up"),
    ),
    "all packets lost": Fault(_drop(1), lambda job, rank: "has not answered", repair=_drop_no_more),
    "disk full": Fault(_fill, lambda job, rank: "", repair=lambda job, rank: _ballast(job).unlink()),
    "SIGTERM to a host": Fault(_to_ranks(Job.neighbours), None),
    "SIGTERM to all": Fault(_to_ranks(lambda job, rank: list(range(job.layout.ranks))), None),
}
PASSING = {
    "some packets lost": Fault(_drop(0.05), None, repair=_drop_no_more),
    "rank stopped for a while": Fault(_signal("SIGSTOP"), None, repair=_signal("SIGCONT")),
}
PASSING_SECONDS = 3


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A small file system that all hosts share."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "soak", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def soak(layout: Layout, faults: int, folder: Path) -> Iterator[dict]:
    """A row for each fault; AssertionError if something does not hold."""
    disk = folder / "disk"
    steps = faults * STEPS_PER_FAULT
    flags = [*TINY, "--global-batch-size", "8", "--hidden-dropout", "0.1", "--switch-iters", str(steps // 3)]
    flags += [*layout.flags, "--train-iters", str(steps), "--save-interval", str(SAVE_INTERVAL)]
    flags += ["--hang-timeout-seconds", str(HANG_SECONDS)]
    flags += ["--eval-interval", "50", "--eval-iters", "1", "--keep-last", "3", *data_flags(folder / "data")]
    with _disk(disk), Cluster(layout.hosts, folder) as cluster:
        undisturbed, run = disk / "undisturbed", disk / "run"
        job = Job(cluster, layout, [*flags, "--save", str(undisturbed)], on_one_host=True)
        assert not any(job.wait(3600)), [job.said(rank) for rank in range(layout.ranks)]
        flags += ["--save", str(run), "--resume", "auto"]
        left = sorted(random.sample(range(5, steps - LAST_STEPS), faults))
        names = [name for _, name in zip(range(faults), _cycle(), strict=False)]
        job = Job(cluster, layout, flags)
        try:
            for step, name in zip(left, names, strict=True):
                wait_until(
                    lambda job=job, step=step: last_step(run) >= step or job.ended(),
                    f"step {step}",
                    seconds=SECONDS_TO_TRAIN,
                )
                assert not job.ended(), [
                    job.said(rank) for rank in range(layout.ranks) if job.ranks[rank].poll()
                ]
                row, job = _passing(job, name, run) if name in PASSING else _one(job, name, run, flags)
                yield {"hosts": layout.hosts, "ranks": layout.ranks, "fault": name, **row}
            assert not any(job.wait(3600)), [job.said(rank) for rank in range(layout.ranks)]
        finally:
            job.kill()
        assert course(run) == course(undisturbed), "the run is not the undisturbed one"


def _cycle() -> Iterator[str]:
    """All faults in random order, again and again."""
    while True:
        yield from random.sample(sorted(ALL | PASSING), len(ALL | PASSING))


def _passing(job: Job, name: str, run: Path) -> tuple[dict, Job]:
    """Break, repair soon after, and see that training goes on."""
    rank = random.randrange(job.layout.ranks)
    PASSING[name].act(job, rank)
    time.sleep(PASSING_SECONDS)
    PASSING[name].repair(job, rank)
    step, began = last_step(run), time.monotonic()
    wait_until(lambda: last_step(run) > step or job.ended(), f"step {step + 1}", seconds=SECONDS_TO_END)
    return {
        "rank": rank,
        "step": step,
        "steps_lost": 0,
        "seconds_to_end": None,
        "seconds_to_recover": round(time.monotonic() - began, 1),
        "complaint": None,
    }, job


def _one(job: Job, name: str, run: Path, flags: list[str]) -> tuple[dict, Job]:
    """Break, wait for the end of all, repair, start again, wait for the step at which it broke."""
    fault, rank = ALL[name], random.randrange(job.layout.ranks)
    time.sleep(random.uniform(0, 0.5))
    began = time.monotonic()
    fault.act(job, rank)
    hit = fault.hits(job, rank)
    remaining = [other for other in range(job.layout.ranks) if other not in hit]
    statuses = [job.ranks[other].wait(SECONDS_TO_END) for other in remaining]
    ended = time.monotonic()
    fault.repair(job, rank)
    job.wait(SECONDS_TO_END)
    complaint = _complaint(job, fault, rank, dict(zip(remaining, statuses, strict=True)))
    step, newest = last_step(run), int(expected_start(run) or 0)
    again = Job(job.cluster, job.layout, flags)
    wait_until(
        lambda: last_step(run) > step or again.ended(), f"a step after {step}", seconds=SECONDS_TO_TRAIN
    )
    return {
        "rank": rank,
        "step": step,
        "steps_lost": step - newest,
        "seconds_to_end": round(ended - began, 1),
        "seconds_to_recover": round(time.monotonic() - ended, 1),
        "complaint": complaint,
    }, again


def _complaint(job: Job, fault: Fault, rank: int, statuses: dict[int, int]) -> str | None:
    """What a rank that is left has said or returned that it should not have; None if all is well."""
    for other, status in statuses.items():
        stdout, stderr = job.said(other)
        stderr = _WARNING.sub("", stderr)
        if fault.names is None:
            well = status == 0 and not stderr
        else:
            well = status != 0 and re.fullmatch(r"rank \d+: error: .*\n", stderr)
            well = well and fault.names(job, rank) in stderr
        if not well:
            return f"rank {other}: status {status}: {stderr or stdout[-500:]}"
    return None


def main(faults: int = 60, seed: int = 0, rows: str = "soak.jsonl") -> None:
    random.seed(seed)
    found = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name, Path(rows).open("w") as file:
        for number, layout in enumerate(LAYOUTS):
            folder = Path(name, str(number))
            folder.mkdir()
            for row in soak(layout, faults, folder):
                found.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(f"{len(found)}: {row}", flush=True)
            print(
                f"after {(time.monotonic() - began) / 60:.1f} min: the run is the undisturbed one", flush=True
            )
    print(_table(found))
    complaints = [row for row in found if row["complaint"]]
    print(f"{len(found)} faults, {len(complaints)} with a wrong word or status")
    sys.exit(bool(complaints))


def _table(rows: list[dict]) -> str:
    lines = [f"{'fault':26} {'times':>5}  median (largest): steps lost, seconds to end, seconds to recover"]
    for fault in [*ALL, *PASSING]:
        of_it = [row for row in rows if row["fault"] == fault]
        values = [[row[key] for row in of_it if row[key] is not None] for key in FIGURES]
        figures = "".join(f"{statistics.median(v):>8g} ({max(v):g})" if v else f"{'-':>8}" for v in values)
        lines.append(f"{fault:26} {len(of_it):5} {figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:3]), *sys.argv[3:4])
