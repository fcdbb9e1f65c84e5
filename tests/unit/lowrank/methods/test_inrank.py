"""What InRank asks for: structure, checks, limits of growth, the switch. No engine is needed to decide."""

from inrank_megatron.lowrank.methods.changes import Change, InitialiseFactors, LayerView, Refactor, SetRank
from inrank_megatron.lowrank.methods.growth import GrowthRule
from inrank_megatron.lowrank.methods.inrank import InRank
from inrank_megatron.lowrank.methods.switch import Switch

RULE = {"initial_rank": 2, "buffer": 6, "threshold": 0.9, "interval": 10}
FLAT = (1.0,) * 64
"""A spectrum that no small rank explains."""
STEEP = (8.0, 7.0, 6.0, *[0.01] * 61)
"""A spectrum that rank 3 explains."""


def method(switch: Switch | None = None, **rule) -> InRank:
    return InRank(GrowthRule(**RULE | rule), switch=switch)


def view(spectrum=FLAT, *, name="fc1", rank=2, active_columns=8, capacity=32, **more) -> LayerView:
    sizes = {"output_size": 256, "input_size": 64, "attainable_rank": 64}
    return LayerView(
        name=name,
        rank=rank,
        active_columns=active_columns,
        capacity=capacity,
        singular_values=spectrum,
        **sizes | more,
    )


def only_check(layer: LayerView, **settings) -> SetRank:
    [change] = decided(method(**settings), 10, [layer])
    return change


def decided(by: InRank, step: int, layers: list[LayerView]) -> list[Change]:
    return by.plan_step(step, layers).decide(layers)


def steps_with_a_plan(by: InRank, last: int) -> list[int]:
    return [step for step in range(1, last + 1) if by.plan_step(step, [])]


def test_columns_are_rank_and_buffer_in_half_the_width():
    spec = method().structure({"fc1": 64})["fc1"]
    assert (spec.capacity, spec.active_columns, spec.rank, spec.frozen_base) == (32, 8, 2, True)


def test_largest_rank_sets_the_columns():
    assert method(max_rank=10).structure({"fc1": 64})["fc1"].capacity == 16
    assert method(max_rank=1000).structure({"fc1": 64})["fc1"].capacity == 64


def test_default_buffer_follows_the_width():
    specs = method(buffer=None).structure({"small": 64, "paper": 768})
    assert {name: spec.active_columns - spec.rank for name, spec in specs.items()} == {
        "small": 8,
        "paper": 100,
    }


def test_start_is_the_first_gradient():
    assert method().initialisation() == [InitialiseFactors(source="gradient", column_norm=0.5, absorb=False)]


def test_spectrum_is_asked_for_at_every_check_and_no_other_step():
    assert steps_with_a_plan(method(), 40) == [10, 20, 30, 40]
    assert method().plan_step(10, []).spectrum == "update"
    assert method(criterion="eq7").plan_step(10, []).spectrum == "product"


def test_nothing_is_decided_after_the_switch():
    efficient = method(Switch(step=20))
    assert steps_with_a_plan(efficient, 20) == [10, 20]
    assert not any(efficient.plan_step(step, [view(final=True)]) for step in range(21, 60))


def test_switch_between_two_checks():
    efficient = method(Switch(step=15))
    assert steps_with_a_plan(efficient, 15) == [10, 15]
    assert efficient.plan_step(15, []).spectrum is None
    assert decided(efficient, 15, [view((), rank=5, active_columns=11)]) == [
        Refactor(ranks={"fc1": 5}, target_columns={"fc1": 5})
    ]


def test_columns_after_the_switch_fill_the_tile_of_the_device():
    [refactor] = decided(method(Switch(step=15, multiple_of=8)), 15, [view((), rank=5, active_columns=11)])
    assert (refactor.ranks, refactor.target_columns) == ({"fc1": 5}, {"fc1": 8})
    [refactor] = decided(method(Switch(step=15, multiple_of=60)), 15, [view((), rank=61, active_columns=64)])
    assert refactor.target_columns == {"fc1": 64}  # never more than the width


def test_growth_keeps_the_buffer():
    change = only_check(view(STEEP, active_columns=8))
    assert (change.rank, change.active_columns, change.capped) == (3, 9, False)
    assert (change.absorb, change.moments) == (False, "zero")
    assert change.explained_ratio >= 0.9
    assert (change.source, change.column_norm) == ("random", 0.1)


def test_rank_that_explains_enough_stays():
    change = only_check(view(STEEP, rank=7, active_columns=13))
    assert (change.rank, change.active_columns, change.capped) == (7, 13, False)


def test_untrained_layer_does_not_grow():
    change = only_check(view((0.0,) * 64))
    assert (change.rank, change.explained_ratio) == (2, 1.0)


def test_growth_of_one_check_is_less_than_the_buffer():
    """The authors' released code searches [r, r + b): beyond it no trained column says anything."""
    change = only_check(view(FLAT[:8]), threshold=1.0)
    assert (change.rank, change.capped) == (2 + 6 - 1, True)


def test_eq7_may_reach_all_trained_columns():
    change = only_check(view(tuple(range(8, 0, -1))), criterion="eq7", window="sliding", threshold=1.0)
    assert (change.rank, change.capped, change.explained_ratio) == (8, False, 1.0)


def test_fixed_window_of_equation_7_ends_at_the_trained_columns():
    """Its last window holds one value, whose variance is 0: rank r + b - 1 always suffices."""
    change = only_check(view(tuple(range(8, 0, -1))), criterion="eq7", window="fixed", threshold=1.0)
    assert (change.rank, change.capped) == (7, False)


def test_buffer_of_one_column_still_grows():
    assert only_check(view(FLAT[:3], active_columns=3), buffer=1, threshold=1.0).rank == 3


def test_growth_stops_at_the_capacity():
    change = only_check(view(FLAT[:30], rank=24, active_columns=30, capacity=32), threshold=1.0)
    assert (change.rank, change.active_columns, change.capped) == (26, 32, True)


def test_full_layer_stays_as_it_is():
    change = only_check(view(FLAT[:32], rank=26, active_columns=32, capacity=32), threshold=1.0)
    assert (change.rank, change.active_columns, change.capped) == (26, 32, True)


def test_check_at_the_switch_decides_the_ranks_of_the_switch():
    changes = decided(
        method(Switch(step=20)), 20, [view(STEEP, name="a"), view(STEEP, name="b", rank=7, active_columns=13)]
    )
    assert [type(change) for change in changes] == [SetRank, SetRank, Refactor]
    assert changes[-1].ranks == {"a": 3, "b": 7}
