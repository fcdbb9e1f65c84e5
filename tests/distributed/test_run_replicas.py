"""A run whose ranks come apart ends: every rank says where, and no later checkpoint is written."""

from pathlib import Path

from tests.distributed.launches import TINY, data_flags, launch
from tests.distributed.planted_difference import WEIGHT

RUN = [*TINY, "--tensor-model-parallel-size", "2", "--switch-iters", "8", "--train-iters", "12"]
RUN += ["--save-interval", "4", "--replica-check-interval", "3"]


def test_replica_difference_stops_the_run(tmp_path):
    script = Path(__file__).with_name("planted_difference.py")
    args = [*RUN, *data_flags(tmp_path / "data"), "--save", str(tmp_path / "run")]
    ended = launch(args, script=script, num_procs=2)
    stderr = ended.stderr
    assert ended.process.returncode != 0
    for rank in (0, 1):
        assert f"rank {rank}: error: {WEIGHT}: ranks 0, 1 differ after step 6" in stderr
    assert "The last good comparison was at step 3" in stderr
    assert "Traceback" not in stderr.split("rank 0: error")[0]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004"]
