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
