"""Whether a job hangs, and on whom the others wait."""

from dataclasses import replace

import pytest

from inrank_megatron.distributed.hang import State, awaited, verdict
from inrank_megatron.distributed.roll import Arrival

HOSTS = [Arrival(f"node-{1 + rank // 2}", "", 1, 0.0, 4, "", None, "") for rank in range(4)]


def states(*entered: dict[str, int], pause: float = 50.0) -> list[State]:
    return [State(f"step {rank}", pause, 45.0, groups) for rank, groups in enumerate(entered)]


# Tensor-parallel groups a of ranks 0, 1 and b of 2, 3; data-parallel groups c of 0, 2 and d of 1, 3. Rank 1
# does not come to the collective of a; 0 waits for it there, 2 is in c and waits for 0, 3 is in d.
CHAIN = [{"a": 8, "c": 3}, {"a": 7, "d": 3}, {"b": 9, "c": 4}, {"b": 9, "d": 4}]
# Rank 1 alone has entered a collective of w, and the others one of v.
EACH_OTHER = [{"v": 5, "w": 0}, {"v": 4, "w": 1}, {"v": 5, "w": 0}, {"v": 5, "w": 0}]
TOGETHER = [{"v": 5}] * 4


@pytest.mark.parametrize(
    ("entered", "named", "each_other"),
    [(CHAIN, [1], False), (EACH_OTHER, [1], True), (TOGETHER, [0, 1, 2, 3], False)],
)
def test_those_that_others_wait_for(entered, named, each_other):
    assert awaited(states(*entered)) == (named, each_other)


def test_the_culprit_is_named_with_what_it_does():
    told = verdict(states(*CHAIN), HOSTS)
    assert told.startswith(
        "rank 1 on host node-1 (in step 1) makes no progress: no rank has made progress for 50 s,"
    )
    assert "--hang-timeout-seconds" in told and "--resume auto" in told


def test_where_all_have_come_equally_far_it_is_the_network_or_a_device():
    told = verdict(states(*TOGETHER), HOSTS)
    assert told.startswith(
        "all ranks are equally far and make no progress: no rank has made progress for 50 s, rank 0"
    )
    assert (
        "rank 0 on host node-1 (in step 0), rank 1 on host node-1 (in step 1) and 2 more; see whether" in told
    )
    assert "the network of hosts node-1, node-2, a device or a disk is lost or too slow" in told


def test_no_job_hangs_in_which_a_rank_gets_on_or_has_said_nothing_yet():
    hanging = states(*CHAIN)
    assert verdict([*hanging[:3], replace(hanging[3], pause=44.0)], HOSTS) is None
    assert verdict([*hanging[:3], None], HOSTS) is None
    assert verdict([*hanging[:3], replace(hanging[3], limit=600.0)], HOSTS) is None
