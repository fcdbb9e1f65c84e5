"""Two ranks compare checkpoints with their manifests: what each reads, and what all are told of damage."""

from pathlib import Path

import pytest

from inrank_megatron.checkpoint import verify
from inrank_megatron.checkpoint.folder import open_newest
from inrank_megatron.distributed.process_groups import initialise
from inrank_megatron.distributed.side_group import SideGroup
from inrank_megatron.training.examining import JobExaminer, share
from tests.harness import run_ranks
from tests.unit.checkpoint.test_writing import DAMAGE, write


def examined(rank: int, world_size: int, root: Path) -> tuple[str, list[str], list[str]]:
    """The newest complete checkpoint, what is said of newer ones, and the files that this rank has hashed."""
    sha256, read = verify.sha256, []

    def seen(path: Path) -> str:
        read.append(f"{path.parent.name}/{path.name}")
        return sha256(path)

    verify.sha256 = seen
    try:
        parallel = initialise(backend="gloo", tensor_model_parallel_size=1)
        examiner = JobExaminer(parallel, SideGroup(parallel), None, patience=0.0)
        if rank != 0:
            examiner.serve()

        def find() -> tuple[str, list[str]]:
            checkpoint, faults = examiner.lead(lambda: open_newest(root, examine=examiner))
            assert checkpoint is None or set(checkpoint.names) == {"w", "half", "b", "scalar"}
            return "none" if checkpoint is None else checkpoint.folder.name, faults

        return *parallel.broadcast_from_rank_0(find), read
    finally:
        verify.sha256 = sha256


def test_every_file_is_read_by_one_rank(tmp_path):
    folder = write(tmp_path, 4)
    first, second = run_ranks(examined, 2, tmp_path)
    assert first[:2] == second[:2] == ("step_00000004", [])
    assert first[2] and second[2] and not set(first[2]) & set(second[2])
    assert sorted(first[2] + second[2]) == sorted(
        f"{folder.name}/{path.name}" for path in folder.iterdir() if path.name != "manifest.json"
    )


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_that_one_rank_finds_is_told_to_all(tmp_path, damage):
    write(tmp_path, 4)
    newer = write(tmp_path, 8)
    DAMAGE[damage](newer)
    alone, faults = open_newest(tmp_path)
    for said in run_ranks(examined, 2, tmp_path):
        assert said[:2] == (alone.folder.name, faults) == ("step_00000004", faults) and len(faults) == 1


def test_files_are_shared_out_by_bytes():
    """Ranks that go on as they saved get their own file; no file is left out or read twice."""
    sizes = [900, 1100, 1000, 1000, 950]
    files = {f"tensors_{n:05d}.safetensors": {"bytes": size} for n, size in enumerate(sizes)}
    files["index.json"] = {"bytes": 40}
    own = [list(share(files, rank, 5)) for rank in range(5)]
    assert [names[-1] for names in own] == sorted(files)[1:] and own[0][0] == "index.json"
    for count in (1, 2, 3, 7, 16):
        names = [name for rank in range(count) for name in share(files, rank, count)]
        assert names == sorted(files)
    assert list(share({"state.json": {"bytes": 0}}, 0, 3)) == ["state.json"]
