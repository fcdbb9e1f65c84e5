"""A rank that is really slower than the others is named; of an even job nothing is said."""

import socket
import time

from inrank_megatron.training.stragglers import FACTOR, LOOK_SECONDS, PATIENCE
from tests.distributed.launches import TINY, Launch, data_flags, last_step, records

EVEN = (PATIENCE + 2) * LOOK_SECONDS  # of training


def elapsed(run):
    return max((record["elapsed_seconds"] for record in records(run, "train")), default=0.0)


def test_a_slowed_rank_is_named_and_an_even_job_is_not(tmp_path):
    run = tmp_path / "run"
    args = [*TINY, *data_flags(tmp_path / "data"), "--switch-iters", "8", "--train-iters", "100000"]
    args += ["--tensor-model-parallel-size", "2", "--log-interval", "10", "--save", str(run)]
    with Launch(args, num_procs=2) as started:
        started.until(lambda: elapsed(run) >= EVEN, "even steps")
        assert records(run, "straggler") == []
        slow = started.ranks()[1]

        def named():
            """Slow the rank by pauses of the whole process, as a hypervisor or a throttled core does."""
            for _ in range(10):
                slow.suspend()
                time.sleep(0.06)
                slow.resume()
                time.sleep(0.03)
            return records(run, "straggler")

        started.until(named, "straggler")
        [found] = records(run, "straggler")
        assert (found["rank"], found["host"]) == (1, socket.gethostname()) and found["factor"] >= FACTOR
        started.until(lambda: len(records(run, "straggler")) > 1, "its end")
        assert records(run, "straggler")[1]["factor"] == 1.0
        step = last_step(run)
        started.until(lambda: last_step(run) > step, "a line of metrics")
    train = records(run, "train")
    assert any(record.get("straggler_rank") == 1 for record in train)
    assert "own work per step" in (run / "logs" / "rank_1.log").read_text()
