"""Processes that meet compare notes before any process group is made."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from inrank_megatron.distributed import rendezvous, roll
from inrank_megatron.distributed.launcher import Ranks
from inrank_megatron.distributed.rendezvous import Meeting, machine_in_words, meet
from inrank_megatron.distributed.roll import Arrival, Roll
from inrank_megatron.errors import UserError
from tests.harness import free_port

ARRIVAL = Arrival("host", "machine", 1, 0.0, 4, "10.0.0.1", None, "digest")
SETTINGS = {"lr": 0.1, "layers": [1, 2]}


def called(*arrivals: Arrival, own: int = 0, world_size: int = 4, seconds: float = 5.0) -> list[Arrival]:
    """The roll as rank ``own`` reads it when the given ones have entered."""
    store = dist.HashStore()
    for rank, arrival in enumerate(arrivals):
        Roll(Ranks(rank, arrival.world_size), store).enter(arrival, SETTINGS)
    return Roll(Ranks(own, world_size), store).call(SETTINGS, time.monotonic() + seconds)


def test_all_ranks_join():
    assert called(*[ARRIVAL] * 4) == [ARRIVAL] * 4


def test_missing_ranks_are_named(monkeypatch, capsys):
    monkeypatch.setattr(roll, "REMINDER_SECONDS", 0.0)
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"ranks 1-3 of 4 not here after \d+ s; the others are, from host host;"
    ):
        called(ARRIVAL, seconds=0.5)
    assert time.monotonic() - began < 10
    assert "ranks 1-3 of 4 not here" in capsys.readouterr().err


def test_duplicate_rank_is_refused():
    store = dist.HashStore()
    Roll(Ranks(1, 4), store).enter(ARRIVAL, SETTINGS)
    with pytest.raises(UserError, match="RANK = 1: another process of this job has that rank"):
        Roll(Ranks(1, 4), store).enter(ARRIVAL, SETTINGS)


def test_different_world_sizes_are_refused():
    """Nobody waits for ranks that only one side expects."""
    other = replace(ARRIVAL, world_size=2)
    with pytest.raises(UserError, match="WORLD_SIZE = 4 on rank 0, and 2 on rank 1 on host host"):
        called(ARRIVAL, other)
    with pytest.raises(UserError, match="WORLD_SIZE = 2 on rank 1, and 4 on rank 0"):
        called(ARRIVAL, other, own=1, world_size=2)


def test_two_ranks_on_one_gpu_are_refused():
    """As without LOCAL_RANK, where each process takes the first; slices of one GPU are two."""
    arrivals = [replace(ARRIVAL, gpu=gpu) for gpu in ("GPU-a", "GPU-b", "MIG-a", "MIG-b")]
    assert called(*arrivals) == arrivals
    arrivals[3] = replace(ARRIVAL, gpu="GPU-b")
    with pytest.raises(UserError, match=r"ranks 1 and 3 on host host have the same GPU.* LOCAL_RANK, set it"):
        called(*arrivals)


def test_a_machine_in_words():
    arrivals = [replace(ARRIVAL, machine=machine) for machine in "abbab"]
    found = Meeting(Ranks(0, 5), dist.HashStore(), arrivals)
    assert machine_in_words(found, "a") == "host host (ranks 0, 3)"
    assert machine_in_words(found, "b") == "host host (ranks 1, 2, 4)"
    assert not found.is_on_one_machine


def test_single_process_needs_no_store(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    alone = meet(timeout_minutes=1, settings=SETTINGS)
    assert alone.is_on_one_machine and alone.ranks == Ranks()
    assert asdict(alone.arrivals[0])["gpu"] is None


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_wait_for_the_slowest(monkeypatch, capsys, late):
    """Longer than the store's own time limit; one of those who wait says for whom."""
    monkeypatch.setattr(rendezvous, "REMINDER_SECONDS", 0.2)
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    others = [Meeting(Ranks(rank, 3), store, [ARRIVAL] * 3) for rank in range(3) if rank != late]
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(other.wait_for_all, "data") for other in others]
        time.sleep(1.0)
        assert not any(each.done() for each in waiting)
        Meeting(Ranks(late, 3), store, [ARRIVAL] * 3).wait_for_all("data")
        assert [each.result(timeout=10) for each in waiting] == [None, None]
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith(f"rank {late} of 3 without data after") for line in lines)


@pytest.mark.parametrize(
    ("rank", "address", "words"),
    [
        (
            "0",
            "no.such.host.invalid",
            r"MASTER_ADDR = 'no.such.host.invalid': this host finds no address for it",
        ),
        ("0", "taken", r"2 ranks cannot meet at 127.0.0.1:\d+ .*EADDRINUSE.*give the launcher a free"),
        ("1", "127.0.0.1", r"2 ranks cannot meet at 127.0.0.1:\d+ "),
        ("0", "127.0.0.1", r"rank 1 of 2 not here after \d+ s"),
    ],
)
def test_no_meeting(monkeypatch, rank, address, words):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if address == "taken" else free_port()
        env = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": str(port)}
        env["MASTER_ADDR"] = "127.0.0.1" if address == "taken" else address
        for name, value in {**env, "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=words) as refused:
            meet(timeout_minutes=0.02, settings=SETTINGS)
    assert "\n" not in str(refused.value)


def test_ranks_that_torchrun_starts_again_meet_afresh_in_its_store(monkeypatch):
    """They were refused as ranks that come twice, so that `--max-restarts` was of no use."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        ranks = Ranks(0, 2, master_addr="127.0.0.1", master_port=agent.port)
        store = rendezvous._store(ranks, time.monotonic() + 10)
        Roll(ranks, store).enter(ARRIVAL, SETTINGS)
    with pytest.raises(UserError, match="RANK = 0: another process"):
        Roll(ranks, store).enter(ARRIVAL, SETTINGS)
