"""A run whose memory runs out on one rank: one line, no rank stays, the checkpoint is whole."""

import re
from pathlib import Path

import pytest

from inrank_megatron.checkpoint.folder import Checkpoint
from tests.distributed.launches import ADAMW, TINY, data_flags, launch, records

SCARCE = Path(__file__).with_name("memory_limit.py")


@pytest.mark.timeout(600)
def test_out_of_memory_on_one_rank_stops_all_with_advice(tmp_path):
    folder = tmp_path / "run"
    # With Muon its step would take the most, which fewer activations do not change.
    args = [*TINY, *ADAMW, *data_flags(tmp_path / "data"), "--train-iters", "6", "--save-interval", "3"]
    run = launch([*args, "--save", str(folder)], num_procs=2, script=SCARCE)
    assert run.process.returncode != 0
    assert "Traceback" not in run.stderr
    lines = sorted(line for line in run.stderr.splitlines() if ": error: " in line)
    assert [line.partition(": ")[0] for line in lines] == ["rank 0", "rank 1"], run.stderr
    assert re.search(r"rank 1 on host \S+ has ended \(last seen in step \d", lines[0])
    assert re.search(
        r"out of memory: [\d.]+ MiB more was asked for, [\d.]+ MiB is left to this process", lines[1]
    )
    assert "the plan of phase 1, W0 + U V, all columns is " in lines[1]
    helps = re.findall(r"(--[a-z0-9-]+)(?: \w+)?(?: in a new run)? \(saves [\d.]+ [MG]iB\)", lines[1])
    assert len(helps) == 3 and "--micro-batch-size" in helps and "--recompute-granularity" in helps
    assert lines[1].endswith("then continue with --resume auto: checkpoints are intact")
    assert Checkpoint(folder / "checkpoints" / "step_00000003").state["step"] == 3
    assert [record["step"] for record in records(folder, "train")] == [1, 2, 3]
