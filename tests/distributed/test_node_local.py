"""Hosts that share no folder: each keeps what its ranks write, and what it lacks comes from the others.

A host here is a folder that its ranks are in, so that one path means another place on each.
"""

import os
import re
import shutil
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from inrank_megatron.checkpoint.folder import Checkpoint, open_newest, published
from inrank_megatron.checkpoint.slices import Slice
from inrank_megatron.distributed.process_groups import initialise
from inrank_megatron.distributed.side_group import SideGroup
from inrank_megatron.errors import UserError
from inrank_megatron.training.examining import JobExaminer
from inrank_megatron.training.fetching import fetch
from inrank_megatron.training.saving import Saver
from inrank_megatron.training.shared_folder import check_unshared
from tests.distributed.test_saving_ranks import Records
from tests.harness import run_ranks

ROOT = Path("checkpoints")
LEADERS = (0, 0, 2, 2)
ROWS = torch.arange(24.0).view(8, 3)
CPU = torch.device("cpu")


def parallel_of(root: Path, rank: int):
    os.chdir(root / f"host_{LEADERS[rank] // 2}")
    return initialise(backend="gloo", tensor_model_parallel_size=1)


def save(
    rank: int, world_size: int, root: Path, steps: list[int], keep_last: int | None, more: float = 0.0
) -> str:
    """Each rank has two rows of eight."""
    with chdir(root):
        parallel = parallel_of(root, rank)
        saver = Saver(
            ROOT,
            parallel=parallel,
            device=CPU,
            run_logger=Records(),
            keep_last=keep_last,
            verified=None,
            leaders=LEADERS,
        )
        for step in steps:
            piece = Slice("w", step * ROWS[2 * rank : 2 * rank + 2] + more, (2 * rank, 0), (8, 3))
            saver.save([piece], {"step": step, "validation_loss": None}, snapshot_bytes=24)
            saver.wait()
        return "saved"


def read_back(rank: int, world_size: int, root: Path) -> tuple:
    """Checkpoint, faults, and two columns of the rows: all of them, or rank 0 and 1 their own alone."""
    with chdir(root):
        parallel = parallel_of(root, rank)
        examiner = JobExaminer(parallel, SideGroup(parallel), LEADERS)
        if rank != 0:
            examiner.serve()
        found, faults = parallel.broadcast_from_rank_0(
            lambda: examiner.lead(lambda: open_newest(ROOT, examine=examiner))
        )
        if found is None:
            return None, faults, None, 0
        holders = parallel.broadcast_from_rank_0(lambda: examiner.holders)
        box = ((0, 1), (8, 2)) if rank > 1 else ((2 * rank, 1), (2, 2))
        fetch(found, [("w", box)], leaders=LEADERS, holders=holders, parallel=parallel)
        return found.folder.name, faults, found.read("w", box), len(found.received)


@pytest.fixture
def hosts(tmp_path):
    for number in (0, 1):
        (tmp_path / f"host_{number}" / ROOT).mkdir(parents=True)
    assert run_ranks(save, 4, tmp_path, [4, 8], None) == ["saved"] * 4
    return [tmp_path / f"host_{number}" / ROOT for number in (0, 1)]


def check(results: list[tuple], step: int) -> None:
    for rank, (name, _, values, received) in enumerate(results):
        rows = slice(2 * rank, 2 * rank + 2) if rank < 2 else slice(None)
        assert name == f"step_{step:08d}" and torch.equal(values, step * ROWS[rows, 1:])
        assert received == (0 if rank < 2 else 2), "what is on this host is not sent"


def test_each_host_keeps_its_part_and_reads_the_rest_from_the_other(hosts, tmp_path):
    common = {"index.json", "manifest.json", "state.json"}
    for number, host in enumerate(hosts):
        own = {f"tensors_{rank:05d}.safetensors" for rank in (2 * number, 2 * number + 1)}
        assert {path.name for path in (host / "step_00000008").iterdir()} == common | own
    check(run_ranks(read_back, 4, tmp_path), 8)


def test_folders_copied_into_one_are_a_complete_checkpoint(hosts):
    shutil.copytree(hosts[1], hosts[0], dirs_exist_ok=True)
    [(_, read)] = Checkpoint(hosts[0] / "step_00000008").tensors(["w"])
    assert torch.equal(read, 8 * ROWS)


def test_a_part_that_no_host_has_is_named_and_the_older_checkpoint_serves(hosts, tmp_path):
    (hosts[1] / "step_00000008" / "tensors_00003.safetensors").unlink()
    results = run_ranks(read_back, 4, tmp_path)
    check(results, 4)
    for _, [fault], _, _ in results:
        assert re.fullmatch(
            r"checkpoints/step_00000008/tensors_00003\.safetensors, written on \S+: on no host of this job; "
            r"start it on the hosts that have the files, or copy them into this folder",
            fault,
        )


def test_a_part_of_another_save_of_the_step_is_damage(hosts, tmp_path):
    """One host has published a step again when the job was killed, and the other has not."""
    before = shutil.copytree(hosts[1], tmp_path / "before")
    run_ranks(save, 4, tmp_path, [8], None, 0.5)
    shutil.rmtree(hosts[1])
    before.rename(hosts[1])
    results = run_ranks(read_back, 4, tmp_path)
    check(results, 4)
    assert "tensors_00002.safetensors: missing, truncated or altered" in results[3][1][0]


def test_other_hosts_remove_what_rank_0_removes(hosts, tmp_path):
    assert run_ranks(save, 4, tmp_path, [12], 1) == ["saved"] * 4
    assert [[path.name for path in published(host)] for host in hosts] == [["step_00000012"]] * 2
    check(run_ranks(read_back, 4, tmp_path), 12)


def see(rank: int, world_size: int, root: Path, is_shared: bool) -> str:
    with chdir(root):
        parallel = parallel_of(root, 0 if is_shared else rank)
        try:
            return check_unshared(ROOT, parallel, LEADERS)
        except UserError as error:
            return str(error)


def test_a_folder_that_two_hosts_share_is_refused(hosts, tmp_path):
    for said in run_ranks(see, 4, tmp_path, False):
        assert said.startswith("each host keeps its own part of a checkpoint in checkpoints; the records are")
    for said in run_ranks(see, 4, tmp_path, True):
        assert re.match(r"checkpoints: is one and the same on hosts \S+ and \S+, and with --use-node", said)
    assert not [path for host in hosts for path in host.glob(".seen*")]
