"""Two hosts: a cable that is pulled or a process that is killed ends the job everywhere, and is named."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.distributed.launches import PATIENCE, TINY, data_flags, last_step
from tests.forked import Forked
from tests.harness import ROOT

NETWORKS = {host: f"inrank-{host}-{os.getpid()}" for host in ("a", "b")}
PROGRAM = Path(__file__).with_name("on_host.py")
RANKS = ("a", "a", "b")  # the hosts of the ranks


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def cable() -> Iterator[str]:
    """Two network namespaces that a cable joins; the end of it that is in host b's."""
    try:
        for network in NETWORKS.values():
            ip("netns", "add", network)
        ends = {host: f"veth-{host}" for host in NETWORKS}
        first, second = NETWORKS.values()
        ip("link", "add", ends["a"], "netns", first, "type", "veth", "peer", ends["b"], "netns", second)
        for number, host in enumerate(NETWORKS, start=1):
            ip("-n", NETWORKS[host], "addr", "add", f"10.77.0.{number}/24", "dev", ends[host])
            for device in (ends[host], "lo"):
                ip("-n", NETWORKS[host], "link", "set", device, "up")
        yield ends["b"]
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or error
        pytest.skip(f"network namespaces need root and iproute2, as `ip netns add test` shows: {reason}")
    finally:
        for network in NETWORKS.values():
            subprocess.run(["ip", "netns", "del", network], check=False, capture_output=True)


def start(folder: Path, rank: int) -> Forked:
    """A rank on its host, as an own launcher there would start it."""
    host = RANKS[rank]
    env = dict(os.environ)
    env |= {"RANK": str(rank), "WORLD_SIZE": str(len(RANKS)), "LOCAL_RANK": str(rank % 2)}
    env |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
    flags = [*TINY, "--global-batch-size", "6", "--train-iters", "5000", "--eval-interval", "5000"]
    flags += [*data_flags(folder.parent / "data"), "--save", str(folder)]
    args = [NETWORKS[host], f"host-{host}", *flags]
    return Forked(PROGRAM, args, num_procs=1, env=env, cwd=ROOT, port=0)


def ends_of(folder: Path, act: Callable[[list[Forked]], None]) -> tuple[list[tuple[int, str]], float]:
    """Train on both hosts, ``act`` in mid-run, and wait; status and errors of each rank, and the seconds."""
    started = [start(folder, rank) for rank in range(len(RANKS))]
    try:
        deadline = time.monotonic() + PATIENCE
        while last_step(folder) < 4:
            ended = [rank.communicate()[1] for rank in started if rank.poll() is not None]
            assert not ended and time.monotonic() < deadline, ended
            time.sleep(0.05)
        act(started)
        began = time.monotonic()
        statuses = [rank.wait(timeout=60) for rank in started]
        seconds = time.monotonic() - began
    finally:
        for rank in started:
            rank.kill()
    return [(status, rank.communicate()[1]) for status, rank in zip(statuses, started, strict=True)], seconds


def test_a_pulled_cable(tmp_path, cable):
    """Each host names the other, within the time that a host may be silent and a few seconds."""
    ends, seconds = ends_of(tmp_path / "run", lambda _: ip("-n", NETWORKS["b"], "link", "set", cable, "down"))
    assert seconds < 20
    for rank, (status, stderr) in enumerate(ends):
        other = "host-a (rank 0)" if RANKS[rank] == "b" else "host-b (rank 2)"
        assert status == 1 and "Traceback" not in stderr
        assert f"rank {rank}: error: host {other} has not answered for 6 s" in stderr
        assert stderr.count("error:") == 1


@pytest.mark.parametrize("lost", [0, 2])
def test_a_killed_process_is_named_on_both_hosts(tmp_path, cable, lost):
    """The ranks of the other host see a victim's broken connection too, and must not blame the victim."""

    def kill(started: list[Forked]) -> None:
        psutil.Process(started[lost].ranks[0].pid).children()[0].kill()

    ends, seconds = ends_of(tmp_path / "run", kill)
    assert seconds < 15
    for rank, (status, stderr) in enumerate(ends):
        assert status != 0
        if rank != lost:
            assert f"rank {rank}: error: rank {lost} on host host-{RANKS[lost]} has ended" in stderr
            assert stderr.count("error:") == 1 and "Traceback" not in stderr
