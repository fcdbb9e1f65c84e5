"""Hosts that share no folder: each has its own text, tokens and part of every checkpoint."""

import os
import shutil
from pathlib import Path

import pytest

from inrank_megatron.checkpoint.folder import Checkpoint
from tests.cluster.hosts import Cluster, Host, need
from tests.cluster.trainings import STEPS, flags, result, run
from tests.distributed import spiking, test_run_spikes
from tests.distributed.launches import PATIENCE, course, data_flags, records
from tests.forked import Forked
from tests.harness import ROOT

HALF, END = f"step_{STEPS // 2:08d}", f"step_{STEPS:08d}"
LOCAL = "--use-node-local-storage"
PROGRAM = Path(__file__).with_name("on_host.py")


def on_host(host: Host, path: Path) -> Path:
    """What ``path`` is on the host, as this process sees it."""
    return Path(f"/proc/{host.first_pid}/root{path}")


def own_folder(host: Host, folder: Path) -> None:
    """Make ``folder`` one of the host's own, which begins with what it holds."""
    host.run("cp", "-r", str(folder), "/run/own")
    host.run("mount", "--bind", "/run/own", str(folder))


@pytest.fixture
def hosts(cluster, trainings):
    """Two hosts whose run folder and data are their own."""
    flags(trainings / "unshared" / "run")  # writes the text
    two = cluster.hosts[:2]
    for host in two:
        own_folder(host, trainings / "unshared")
    yield two
    for host in two:
        host.run("umount", str(trainings / "unshared"))
        host.run("rm", "-r", "/run/own")


def test_hosts_without_a_common_folder(cluster, trainings, one_host, hosts, tmp_path):
    """The training is that of one host; what the hosts have makes up its checkpoints; from these it goes on
    with other ranks, and so with parts that the other host has.
    """
    folder = trainings / "unshared" / "run"
    told = run(cluster, "torchrun_static.sh", folder, LOCAL)
    assert told.count(f"each host keeps its own part of a checkpoint in {folder}; the records are on") == 1
    places = [on_host(host, folder) for host in hosts]
    caches = [sorted(p.name for p in (place.parent / "data" / "cache").iterdir()) for place in places]
    assert caches[0] == caches[1] and any((places[0].parent / "data" / "cache").rglob("meta.json"))
    for number, place in enumerate(places):
        files = sorted(path.name for path in (place / "checkpoints" / END).glob("*.safetensors"))
        assert files == [f"tensors_{rank:05d}.safetensors" for rank in (2 * number, 2 * number + 1)]
    for place in places:
        shutil.copytree(place, tmp_path / "gathered", dirs_exist_ok=True)
    assert result(tmp_path / "gathered") == one_host
    assert Checkpoint(tmp_path / "gathered" / "checkpoints" / END).state["step"] == STEPS

    shutil.rmtree(places[0] / "checkpoints" / END)
    more = [LOCAL, "--resume", "auto", "--tensor-model-parallel-size", "1"]
    told = run(cluster, "torchrun_static.sh", folder, *more, slots=1)
    assert told.count(f"resumed at step {STEPS // 2} in {folder}") == 1
    first, second = course(tmp_path / "gathered"), course(places[0])
    for one, other in zip(first["train"], second["train"], strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    assert first["ranks"] == second["ranks"]


def test_a_rollback_to_a_checkpoint_of_which_each_host_has_a_part(tmp_path):
    need()
    folder, spike = tmp_path / "own" / "run", test_run_spikes.SPIKE
    args = [*test_run_spikes.FLAGS, *data_flags(folder.parent / "data"), "--save", str(folder), LOCAL]
    env = os.environ | {spiking.NOISE: str(spike - 1), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    env |= {"MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}
    with Cluster(2, tmp_path) as cluster:
        ranks = []
        for rank, host in enumerate(cluster.hosts):
            own_folder(host, folder.parent)
            words = [str(host.first_pid), spiking.__file__, *args, "--on-loss-spike", "rollback"]
            ranks.append(Forked(PROGRAM, words, num_procs=1, env=env | {"RANK": str(rank)}, cwd=ROOT, port=0))
        try:
            statuses = [rank.wait(timeout=PATIENCE) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        outputs = [rank.communicate() for rank in ranks]
        assert statuses == [0, 0], outputs
        assert f"rolled back from the loss spike of step {spike} to step_00000016" in outputs[0][0]
        assert records(on_host(cluster.hosts[0], folder), "checkpoint")[-1]["step"] == test_run_spikes.STEPS
