"""Alternatives take turns, and ratios compare what ran in the same round."""

from inrank_megatron.benchmarks.timing import Times, interleaved


def test_alternatives_are_timed_in_turn():
    ran = []
    times = interleaved({name: lambda name=name: ran.append(name) for name in "abc"}, repeats=2)
    assert "".join(ran) == "abc" + "abc" + "bca"
    assert all(len(times.seconds[name]) == 2 for name in "abc")


def test_one_slow_round_does_not_change_ratios():
    times = Times({"own": [1.0, 100.0, 1.2], "dense": [2.0, 200.0, 2.4]})
    assert times.ratio("own", "dense") == 0.5
    assert times.median("own") == 1.2


def test_the_interval_of_a_ratio_is_that_of_the_sign_test():
    """Of 41 values the 14th and the 28th, of 6 the extremes; fewer do not reach 95 %."""
    for rounds, (low, high) in {41: (14, 28), 6: (1, 6), 3: (1, 3)}.items():
        times = Times({"own": [float(i) for i in range(rounds, 0, -1)], "dense": [1.0] * rounds})
        assert times.interval("own", "dense") == (low, high)
