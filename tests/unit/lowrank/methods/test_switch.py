"""What the switch asks for: ranks, columns, and when patience runs out."""

from dataclasses import replace

import pytest

from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.changes import Change, LayerView, LostCheck, Metric, Refactor, SetRank
from inrank_megatron.lowrank.methods.fixed_rank import FixedRank
from inrank_megatron.lowrank.methods.growth import GrowthRule
from inrank_megatron.lowrank.methods.inrank import InRank, InRankEfficient
from inrank_megatron.lowrank.methods.switch import Switch, size_in_words
from inrank_megatron.lowrank.methods.warm_start import WarmStart

FISHER = Metric("fisher", 2)


def view(energies=(), *, name="fc1", output_size=32, input_size=8, **more) -> LayerView:
    """A dense linear with these energies of its output, unless ``more`` says otherwise."""
    d = min(output_size, input_size)
    sizes = {"rank": d, "active_columns": d, "capacity": d, "attainable_rank": d}
    return LayerView(name, output_size, input_size, output_energies=tuple(energies), **sizes | more)


def decided(method, step: int, layers: list[LayerView]) -> list[Change]:
    plan = method.plan_step(step, layers)
    return plan.decide(layers) if plan else []


def spectrum(method, step: int, layers: list[LayerView]):
    plan = method.plan_step(step, layers)
    return plan and plan.spectrum


STEEP = view([8.0, 4.0, 2.5, 1.0, 0.5, 0.25, 0.125, 0.125], name="steep")
FLAT = view([1.0] * 8, name="flat")


def test_threshold_holds_for_every_layer():
    assert Switch(step=5, threshold=0.9).refactor([STEEP, FLAT]) == Refactor(
        ranks={"steep": 4, "flat": 8}, target_columns={"steep": 4, "flat": 8}
    )


def test_columns_are_rounded_up_and_ranks_stay():
    refactor = Switch(step=5, threshold=0.75, multiple_of=4).refactor([STEEP, FLAT])
    assert (refactor.ranks, refactor.target_columns) == ({"steep": 3, "flat": 6}, {"steep": 4, "flat": 8})


def test_budget_counts_each_layers_own_output_whatever_its_scale():
    """512 dense parameters, columns of 40: 240 buy six of them."""
    scaled = view([1e6 * energy for energy in [1.0] * 8], name="flat")
    for flat in (FLAT, scaled):
        refactor = Switch(step=5, budget=0.47).refactor([STEEP, flat])
        assert refactor.ranks == refactor.target_columns == {"steep": 3, "flat": 3}


def test_budget_counts_loss_where_the_gradient_weighs():
    def columns(scale):
        flat = view([scale] * 8, name="flat")
        return Switch(step=5, budget=0.47, metric=FISHER).refactor([STEEP, flat]).target_columns

    assert columns(0.1) == {"steep": 5, "flat": 1}
    assert columns(9.0) == {"steep": 1, "flat": 5}


def test_budget_is_kept_with_whole_tiles():
    refactor = Switch(step=5, budget=0.47, multiple_of=2).refactor([STEEP, FLAT])
    assert refactor.target_columns == {"steep": 2, "flat": 4}


def test_size_is_told_with_what_more_of_it_would_keep():
    """Each of the two has 256 dense parameters, a column 40."""
    said = size_in_words([STEEP, FLAT], {"steep": 3, "flat": 3})
    assert said == (
        "0.47 of these linears' dense parameters keep 62.7% of their outputs' energy, 1.5 times as many "
        "would keep 81.4%"
    )
    everything = size_in_words([STEEP, FLAT], {"steep": 8, "flat": 8})
    assert everything == "1.25 of these linears' dense parameters keep 100.0% of their outputs' energy"
    assert size_in_words([view()], {"fc1": 2}) == "0.31 of these linears' dense parameters"


def test_without_w0_no_rank_exceeds_the_columns():
    product = view([1.0] * 8, rank=2, active_columns=4, capacity=6, attainable_rank=4)
    assert Switch(step=5, threshold=0.9).refactor([product]).ranks == {"fc1": 4}


def test_warm_start_looks_at_outputs_once():
    method = WarmStart(Switch(step=7, metric=FISHER, threshold=0.9))
    assert method.structure({"fc1": 8}) == {}
    assert [step for step in range(1, 20) if method.plan_step(step, [STEEP])] == [7]
    assert spectrum(method, 7, [STEEP]) == FISHER
    assert decided(method, 7, [STEEP]) == [Refactor({"steep": 4}, {"steep": 4}, metric=FISHER)]


def patient(**switch) -> InRank:
    rule = GrowthRule(initial_rank=2, buffer=2, threshold=0.9, interval=10, after=20)
    return InRank(rule, switch=Switch(patience=2, **switch))


def growing(name="fc1", *, grown_at=0, final=False, energies=()) -> LayerView:
    more = {"rank": 2, "active_columns": 4, "capacity": 6, "attainable_rank": 8}
    return view(energies, name=name, grown_at=grown_at, final=final, **more)


@pytest.mark.parametrize(
    ("grown_at", "switch"), [((0, 0), 41), ((30, 0), 51), ((30, 40), 61), ((50, 0), 71)], ids=str
)
def test_patience_counts_checks_since_any_layer_grew(grown_at, switch):
    """Checks come at 30, 40, ...: two without growth, and the switch follows one step after the second."""
    method = patient()
    layers = [growing(f"fc{i}", grown_at=step) for i, step in enumerate(grown_at)]
    later = range(max(grown_at) + 1, 100)
    steps = [step for step in later if isinstance_last(decided(method, step, layers), Refactor)]
    assert steps[0] == switch
    assert spectrum(method, switch - 1, layers) == "update"
    assert spectrum(method, switch, layers) is None


def test_an_overflow_counts_for_patience_at_a_check_alone():
    """Else loss scaling, which tries a larger scale now and then, would put off the switch for ever."""
    layers, method = [replace(growing(), updated=False)], patient()
    assert decided(method, 30, layers) == [LostCheck("fc1")]  # which counts as growth does, see above
    assert method.plan_step(35, layers) is None


def isinstance_last(changes, kind) -> bool:
    return bool(changes) and isinstance(changes[-1], kind)


def test_patience_with_ranks_by_outputs_looks_at_them_at_the_switch():
    method = patient(threshold=0.9, metric=FISHER)
    assert spectrum(method, 40, [growing()]) == "update"
    assert [type(change) for change in decided(method, 40, [growing()])] == [SetRank]
    assert spectrum(method, 41, [growing()]) == FISHER
    layer = growing(energies=[8.0, 4.0, 2.0, 1.0])
    assert decided(method, 41, [layer]) == [Refactor({"fc1": 3}, {"fc1": 3}, metric=FISHER)]


def test_nothing_follows_the_switch():
    method = patient()
    for step in range(1, 100):
        assert method.plan_step(step, [growing(final=True)]) is None


def test_a_run_that_never_stood_still_says_so():
    assert "did not stop growing for 2 checks" in patient().unfinished([growing()])
    assert patient().unfinished([growing(final=True)]) is None
    assert WarmStart(Switch(step=7)).unfinished([FLAT]) is None
    assert InRank(patient().growth).unfinished([growing()]) is None


def test_a_first_phase_without_a_decision_says_so():
    rule = GrowthRule(initial_rank=2, buffer=2, threshold=0.9, interval=10)
    left = InRankEfficient(rule, switch=Switch(step=9)).unfinished([growing(final=True)])
    assert left.startswith("no rank check came in the 9 steps of the first phase, so all ranks are still 2;")
    left = InRankEfficient(rule, switch=Switch(step=1)).unfinished([growing(final=True)])
    assert left.startswith("no rank check came in the 1 step of the first phase,")
    for switch in (Switch(step=10), Switch(step=9, re_estimated=True), Switch(step=9, threshold=0.9)):
        assert InRankEfficient(rule, switch=switch).unfinished([growing(final=True)]) is None


def test_a_fixed_rank_is_final():
    assert FixedRank(8).structure({"fc1": 4}) == {
        "fc1": FactorSpec(capacity=4, active_columns=4, rank=4, frozen_base=False, final=True)
    }


def test_re_estimated_ranks_may_fall():
    """A check grows or keeps; the look at the switch finds what the spectrum of that moment asks for."""
    rule = GrowthRule(initial_rank=2, buffer=2, threshold=0.9, interval=10)
    layer = replace(growing(), rank=3, active_columns=5, singular_values=(3.0, 0.1, 0.1, 0.1))
    for step in (40, 45):  # 45: no check is due
        found = InRank(rule, switch=Switch(step=step, re_estimated=True))
        assert spectrum(found, step, [layer]) == "update"
        assert decided(found, step, [layer]) == [Refactor({"fc1": 1}, {"fc1": 1})]
    grown = InRank(rule, switch=Switch(step=40))
    *_, refactor = decided(grown, 40, [layer])
    assert refactor == Refactor({"fc1": 3}, {"fc1": 3})
    overflowed = replace(layer, updated=False)
    assert decided(found, 45, [overflowed]) == [Refactor({"fc1": 1}, {"fc1": 1})]
    assert decided(grown, 40, [overflowed]) == [LostCheck("fc1"), Refactor({"fc1": 3}, {"fc1": 3})]
    assert decided(InRank(rule), 40, [overflowed]) == [LostCheck("fc1")]
