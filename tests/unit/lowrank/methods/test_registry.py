"""When the switch comes, and which method a configuration means."""

import pytest

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.schema import TrainingConfig
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.changes import InitialiseFactors, Metric, Refactor
from inrank_megatron.lowrank.methods.dense import Dense
from inrank_megatron.lowrank.methods.fixed_rank import FixedRank
from inrank_megatron.lowrank.methods.growth import GrowthRule
from inrank_megatron.lowrank.methods.registry import METHODS, make_method, switch_step
from inrank_megatron.lowrank.methods.switch import Switch


def config(method="inrank-efficient", **changes):
    return from_flat({"model_preset": "tiny", "train_iters": 100, "method": method, **changes})


@pytest.mark.parametrize(
    ("settings", "steps_per_epoch", "expected"),
    [
        ({}, 20, 20),
        ({}, 80, 25),
        ({"train_iters": 3}, 80, 1),
        ({"switch_iters": 7}, 30, 7),
        ({"switch_epochs": 0.5}, 30, 15),
        ({"switch_epochs": 0.001}, 30, 1),
    ],
    ids=["one epoch", "a quarter of the run at most", "three steps", "steps", "epochs", "at least one step"],
)
def test_switch_step(settings, steps_per_epoch, expected):
    assert switch_step(config(**settings), steps_per_epoch) == expected


@pytest.mark.parametrize(
    "settings", [{"switch_iters": 100}, {"switch_epochs": 4.0}, {"train_iters": 1}], ids=str
)
def test_switch_after_the_last_but_one_step_is_refused(settings):
    with pytest.raises(
        UserError,
        match=r"the switch must come before the last of \d+ steps; raise train_iters, switch earlier",
    ):
        switch_step(config(**settings), 30)


@pytest.mark.parametrize("method", ["dense", "fixed-rank", "inrank"])
def test_other_methods_never_switch(method):
    assert switch_step(config(method), 30) is None


def test_every_method_of_the_configuration_exists_and_knows_its_name():
    for name in TrainingConfig.model_fields["method"].annotation.__args__:
        step = 10 if METHODS[name].switches else None
        assert make_method(config(name, rank=8), switch_step=step).name == name


def test_settings_reach_the_method():
    settings = {
        "initial_rank": 3,
        "buffer": 5,
        "threshold": 0.7,
        "rank_check_interval": 4,
        "rank_check_start": 6,
        "max_rank": 20,
        "rank_criterion": "eq7",
        "eq7_window": "fixed",
        "initial_column_norm": 0.2,
        "new_column_norm": 0.3,
        "new_column_moments": "mean",
        "factor_init": "random",
        "absorb_columns": True,
        "rank_multiple_of": 8,
        "activation_batches": 3,
        "truncation": "fisher",
        "final_ranks": "output",
        "parameter_budget": 0.3,
        "switch_patience": 2,
    }
    rule = GrowthRule(3, 5, 0.7, 4, after=6, criterion="eq7", window="fixed", max_rank=20)
    switch = Switch(patience=2, metric=Metric("fisher", 3), budget=0.3, multiple_of=8)
    expected = {
        "growth": rule,
        "source": "random",
        "initial_column_norm": 0.2,
        "new_column_norm": 0.3,
        "new_column_moments": "mean",
        "frozen_base": True,
        "absorb": True,
    }
    grown = make_method(config("inrank", **settings), switch_step=None)
    assert vars(grown) == expected | {"switch": None}
    efficient = make_method(config("inrank-efficient", **settings), switch_step=None)
    assert vars(efficient) == expected | {"switch": switch}


def test_without_w0_columns_are_kaiming_entries():
    settings = {"frozen_base": False, "rank_criterion": "released", "factor_init": "kaiming"}
    method = make_method(config("inrank", **settings), switch_step=None)
    assert method.initialisation() == [InitialiseFactors(source="kaiming", column_norm=None, absorb=False)]


def test_weights_from_elsewhere_are_left_as_they_are():
    def absorbs(**settings):
        return make_method(config("inrank", **settings), switch_step=None).absorb

    assert not absorbs()
    assert absorbs(pretrained_checkpoint="runs/dense")
    assert not absorbs(pretrained_checkpoint="runs/dense", absorb_columns=False)


@pytest.mark.parametrize(
    ("beta1", "beta2", "moments"),
    [
        (0.9, 0.95, "zero"),
        (0.9, 0.955, "zero"),
        (0.9, 0.96, "mean"),
        (0.9, 0.999, "mean"),
        (0.0, 0.5, "mean"),
        (0.95, 0.9, "mean"),
    ],
)
def test_late_columns_start_from_zero_where_no_step_can_be_much_above_the_rate(beta1, beta2, moments):
    """The largest steps from moments of zero are 1.17, 1.21, 1.26, 7.3, 1.4 and without bound."""
    betas = {"adam_beta1": beta1, "adam_beta2": beta2}
    assert make_method(config("inrank", **betas), switch_step=None).new_column_moments == moments
    given = make_method(config("inrank", new_column_moments="zero", **betas), switch_step=None)
    assert given.new_column_moments == "zero"


@pytest.mark.parametrize(
    ("settings", "metric"),
    [
        ({}, Metric("activation-aware", 4)),
        ({"truncation": "plain"}, Metric("plain", 0)),
        ({"truncation": "fisher", "activation_batches": 2}, Metric("fisher", 2)),
    ],
)
def test_truncation_is_the_metric_of_the_switch(settings, metric):
    method = make_method(config("inrank-efficient", **settings), switch_step=7)
    [refactor] = [change for change in method.plan_step(7, []).decide([]) if isinstance(change, Refactor)]
    assert refactor.metric == metric


def test_dense_asks_for_nothing():
    method = Dense()
    assert method.structure({"fc1": 64}) == {}
    assert method.initialisation() == []
    assert not any(method.plan_step(step, []) for step in range(100))


def test_fixed_rank_is_cut_to_the_width():
    specs = FixedRank(48).structure({"wide": 64, "narrow": 32})
    assert {name: (s.capacity, s.active_columns, s.rank, s.frozen_base) for name, s in specs.items()} == {
        "wide": (48, 48, 48, False),
        "narrow": (32, 32, 32, False),
    }
    assert FixedRank(48).initialisation() == [InitialiseFactors(source="spectral")]
    drawn = make_method(config("fixed-rank", rank=8, factor_init="random"), switch_step=None)
    assert drawn.initialisation() == [InitialiseFactors(source="random-like-weight")]
    assert not any(FixedRank(48).plan_step(step, []) for step in range(100))
