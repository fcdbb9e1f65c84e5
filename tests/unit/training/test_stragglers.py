"""A rank is a straggler if it is slower than the others at several looks in a row."""

from inrank_megatron.training.stragglers import FACTOR, LOOK_SECONDS, PATIENCE, Stragglers

HOSTS, STEPS = ["a", "a", "b", "b"], 10


def looks(stragglers, seconds, times):
    """What is new at each of several looks."""
    return [stragglers.add(seconds, STEPS) for _ in range(times)]


def test_a_slow_rank_is_named_once_with_its_host_and_when_it_is_over():
    stragglers = Stragglers(HOSTS)
    *before, (new, over) = looks(stragglers, [1.0, 1.1, 1.0, 1.8], PATIENCE)
    assert before == [([], [])] * (PATIENCE - 1) and over == []
    assert [(x.rank, x.host, x.seconds) for x in new] == [(3, "b", 1.8)]
    assert str(new[0]) == "rank 3 on b takes 1.8 times as long as the other ranks"
    assert looks(stragglers, [1.0, 1.1, 1.0, 1.9], 3) == [([], [])] * 3, "it is known"
    assert stragglers.known[3].factor == 1.9
    assert stragglers.add([1.0, 1.1, 1.0, 1.0], STEPS) == ([], [3]) and not stragglers.known


def test_pauses_of_different_ranks_are_none():
    stragglers = Stragglers(HOSTS)
    for turn in range(12):
        seconds = [1.0] * 4
        seconds[turn % 4] = 9.0
        assert stragglers.add(seconds, STEPS) == ([], [])


def test_two_ranks_and_a_whole_group():
    two = Stragglers(["a", "b"])
    [new] = [new for new, _ in looks(two, [1.0, FACTOR + 0.01], PATIENCE) if new]
    assert [x.rank for x in new] == [1]
    [group] = [new for new, _ in looks(Stragglers(HOSTS * 2), [1.0] * 5 + [2.0] * 3, PATIENCE) if new]
    assert [x.rank for x in group] == [5, 6, 7]


def test_even_ranks_and_a_single_one():
    assert looks(Stragglers(HOSTS), [1.0, 1.2, 1.1, 1.3], 9) == [([], [])] * 9
    assert looks(Stragglers(["a"]), [1.0], 9) == [([], [])] * 9


def test_a_look_is_over_seconds_not_over_a_few_short_steps():
    stragglers, short = Stragglers(["a", "b"]), LOOK_SECONDS / 64
    added = [stragglers.add([short / 2, short], STEPS) for _ in range(7 * PATIENCE)]
    assert [index for index, (new, _) in enumerate(added, start=1) if new] == [7 * PATIENCE]
