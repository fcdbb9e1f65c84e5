"""Saves of two ranks: what one of them cannot write, and one that is killed in the middle of its part."""

import re
import signal
import time
from pathlib import Path

import pytest
import torch

from inrank_megatron.checkpoint import writing
from inrank_megatron.checkpoint.folder import Checkpoint, newest_complete, published
from inrank_megatron.checkpoint.retention import tidy
from inrank_megatron.checkpoint.slices import Slice
from inrank_megatron.distributed.process_groups import initialise
from inrank_megatron.errors import UserError
from inrank_megatron.training.saving import Saver
from inrank_megatron.training.shared_folder import check_shared
from tests.distributed.launches import TINY, Launch, data_flags
from tests.distributed.pausing import PAUSE, PHASE_FILE
from tests.harness import run_ranks

ROWS = torch.arange(8.0).view(4, 2)


class Records:
    def event(self, kind, step, text, **values):
        pass


def save_twice(rank: int, world_size: int, root: Path, fault: Exception | None) -> str:
    """Each rank has two of the four rows. In the second save rank 1 cannot write."""
    parallel, cpu = initialise(backend="gloo", tensor_model_parallel_size=1), torch.device("cpu")
    saver = Saver(root, parallel=parallel, device=cpu, run_logger=Records(), keep_last=None, verified=None)
    save_file = writing.save_file
    try:
        for step in (1, 2):
            piece = Slice("w", step * ROWS[2 * rank : 2 * rank + 2], (2 * rank, 0), (4, 2))
            if (step, rank) == (2, 1) and fault is not None:
                writing.save_file = _failing(fault)
            saver.save([piece], {"step": step}, snapshot_bytes=16)
            saver.wait()
    except (UserError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        writing.save_file = save_file
    return "saved"


def _failing(fault: Exception):
    def save_file(*_):
        raise fault

    return save_file


def test_each_rank_writes_its_rows_and_a_reader_has_them_all(tmp_path):
    assert run_ranks(save_twice, 2, tmp_path, None) == ["saved"] * 2
    for step in (1, 2):
        [(_, read)] = Checkpoint(tmp_path / f"step_{step:08d}").tensors(["w"])
        assert torch.equal(read, step * ROWS)
    files = sorted(path.name for path in (tmp_path / "step_00000002").glob("*.safetensors"))
    assert files == ["tensors_00000.safetensors", "tensors_00001.safetensors"]


def test_a_part_that_cannot_be_written_ends_all_ranks_alike(tmp_path):
    told = run_ranks(save_twice, 2, tmp_path, OSError(28, "No space left on device"))
    assert told[0] == told[1] and re.match(
        r"UserError: .*step_00000002: the checkpoint cannot be written .*No space left on device", told[0]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"] and Checkpoint(
        tmp_path / "step_00000001"
    )


def test_a_fault_of_the_program_is_told_where_it_was(tmp_path):
    first, second = run_ranks(save_twice, 2, tmp_path, ZeroDivisionError("planted"))
    assert first == "UserError: a rank has failed to save (ZeroDivisionError); its own message says why"
    assert second == "ZeroDivisionError: planted"
    assert [path.name for path in published(tmp_path)] == ["step_00000001"]


def see(rank: int, world_size: int, root: Path, is_shared: bool) -> str:
    folder = root if is_shared or rank == 0 else root / "elsewhere"
    try:
        check_shared(folder, initialise(backend="gloo", tensor_model_parallel_size=1), patience=0.0)
    except UserError as error:
        return str(error)
    return "all see it"


def test_a_folder_that_a_rank_does_not_see_is_refused_on_all(tmp_path):
    assert run_ranks(see, 2, tmp_path, True) == ["all see it"] * 2
    for told in run_ranks(see, 2, tmp_path, False):
        assert re.search(r": rank 1 on host \S+ does not see what rank 0 has written there", told)
        assert told.endswith("give --save a folder that all hosts share, or --use-node-local-storage")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(600)
def test_a_rank_that_is_killed_in_the_middle_of_its_part(tmp_path):
    """The others end, and what has been published stays; nothing of the save is under a final name."""
    folder, phase_file = tmp_path / "run", tmp_path / "phase"
    args = [*TINY, *data_flags(tmp_path / "data"), "--tensor-model-parallel-size", "2", "--save", str(folder)]
    args += ["--train-iters", "40", "--save-interval", "2"]
    env = {PHASE_FILE: str(phase_file), PAUSE: "inside a tensor file/2/20"}
    script = Path(__file__).with_name("pausing.py")
    with Launch(args, launcher="forked", num_procs=2, script=script, env=env) as started:
        started.until(phase_file.exists, "the second save")
        time.sleep(0.2)
        started.ranks()[1].send_signal(signal.SIGKILL)
        started.wait()
    assert started.process.returncode != 0
    assert re.search(r"rank 0: error: rank 1 on host \S+ has ended \(last seen in ", started.stderr)
    assert "Traceback" not in started.stderr
    root = folder / "checkpoints"
    assert [path.name for path in root.iterdir()] != ["step_00000002"], "the save has left its hidden folder"
    tidy(root)
    assert newest_complete(root) == (root / "step_00000002", [])
    assert [path.name for path in root.iterdir()] == ["step_00000002"]
