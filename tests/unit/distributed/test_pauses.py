"""How long a pause may last: for ever before the training, long at first times, then as has been learnt."""

import math

import pytest

from inrank_megatron.distributed.marks import NEW_MODEL, Marks
from inrank_megatron.distributed.pauses import REMEMBERED, TIMES, Pauses, WakingClock

LEAST, LONGEST = 45.0, 600.0


class Rank:
    """A rank whose time the test lets pass."""

    def __init__(self) -> None:
        self.now, self.marks, self.sign = 0.0, Marks(), 0
        self.pauses = Pauses(self.marks, least=LEAST, longest=LONGEST, clock=lambda: self.now)

    def work(self, kind: str, *pauses: float) -> float:
        """Begin a work that pauses so; the limit in it."""
        self.marks.begin(kind, 1)
        self.pauses.see(self.sign)
        for seconds in pauses:
            self.now += seconds
            self.sign += 1
            self.pauses.see(self.sign)
        return self.pauses.limit


@pytest.fixture
def rank() -> Rank:
    return Rank()


def test_before_the_training_a_rank_may_pause_for_ever(rank):
    rank.now = 1e6
    assert rank.pauses.seconds == 1e6 and rank.pauses.limit == math.inf


def test_a_kind_of_work_that_is_new_has_the_long_limit(rank):
    assert rank.work("step", 100.0) == LONGEST
    assert rank.work("evaluation") == LONGEST
    assert rank.work("step") == TIMES * 100
    assert rank.work("evaluation") == LEAST


def test_any_sign_ends_a_pause(rank):
    rank.work("step", 1.0)
    rank.now += 40
    assert rank.pauses.seconds == 40
    rank.pauses.see(rank.sign)
    assert rank.pauses.seconds == 40, "no sign"
    rank.sign += 1
    rank.pauses.see(rank.sign)
    assert rank.pauses.seconds == 0


def test_the_limit_is_learnt_from_the_last_works_of_the_kind(rank):
    rank.work("step", 120.0)  # it compiles
    assert rank.work("step", 1.0, 30.0, 2.0) == 480
    for _ in range(REMEMBERED - 1):
        assert rank.work("step", 1.0) == 480
    assert rank.work("step") == TIMES * 30, "the first is forgotten"
    for _ in range(REMEMBERED):
        rank.work("step", 1.0)
    assert rank.work("step") == LEAST
    rank.work("save", 400.0)
    assert rank.work("save") == LONGEST, "no more than what a collective waits"


def test_work_that_was_too_short_to_be_seen_is_known_too(rank):
    rank.marks.begin("step", 1)
    assert rank.work("step") == LEAST


@pytest.mark.parametrize("kind", NEW_MODEL)
def test_with_a_model_that_is_built_again_everything_is_new(rank, kind):
    rank.work("step", 1.0)
    assert rank.work("step") == LEAST
    rank.work(kind, 1.0)
    assert rank.work("step") == LONGEST


def test_a_suspended_process_does_not_count_its_own_sleep():
    now = [0.0]
    clock = WakingClock(lambda: now[0], most=2.0)
    assert clock() == 0
    now[0] = 1.5
    assert clock() == 1.5
    now[0] = 5000.0
    assert clock() == 3.5
