"""Choosing rates, sizes and steps, and reading run folders back, against small cases worked out by hand."""

import json
from pathlib import Path

import pytest
import yaml

from inrank_megatron.config.cli import parse
from inrank_megatron.config.loading import flatten
from inrank_megatron.errors import UserError
from inrank_megatron.experiments import compare
from inrank_megatron.experiments.arms import (
    ARMS,
    FIRST,
    Result,
    Size,
    best_rate,
    equal_flops_steps,
    flags,
    missing_rates,
    row,
)

BUDGET = Size(46, 0.3)
MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --seq-length 16 --micro-batch-size 2"
SHAPE = parse(MODEL.split(), world_size=1).config.model


def result(valid=10.0, *, test=11.0, flops=100.0, size=None) -> Result:
    return Result(valid=valid, test=test, size=size, parameters=1000, flops=flops, seconds=2.0)


def test_rate_is_chosen_on_validation_and_failed_runs_have_none():
    by_rate = {1e-3: result(9.0, test=5.0), 2e-3: result(8.0, test=6.0), 4e-3: None}
    assert best_rate(by_rate) == 2e-3
    assert best_rate({1e-3: None}) is None


def test_rates_go_on_beyond_an_edge_until_the_best_lies_inside():
    tried = {1e-3: result(9.0), 2e-3: result(8.0)}
    assert missing_rates([1e-3, 2e-3, 4e-3], tried) == [4e-3]
    assert missing_rates([1e-3, 2e-3], tried) == [4e-3]
    assert missing_rates([1e-3, 2e-3], tried | {4e-3: result(8.5)}) == []
    assert missing_rates([1e-3, 2e-3], tried | {4e-3: None}) == []
    assert missing_rates([1e-3, 2e-3], {1e-3: result(7.0), 2e-3: result(8.0)}) == [5e-4]
    assert missing_rates([1e-3], {1e-3: result()}) == []


def test_arms_wait_for_the_found_size_and_then_have_at_least_it():
    arm = "fixed rank, random, found rank"
    assert flags(arm, steps=100, found=None, budget=BUDGET, model=SHAPE) is None
    given = flags(arm, steps=100, found=Size(12.25, 0.08), budget=BUDGET, model=SHAPE)
    assert given[given.index("--rank") + 1] == "13"
    shared = flags("warm start, found size", steps=100, found=Size(12.25, 0.08), budget=BUDGET, model=SHAPE)
    assert 0.08 < float(shared[shared.index("--parameter-budget") + 1]) < 0.08001


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_accepted_by_the_launcher(arm, tmp_path):
    given = flags(arm, steps=100, found=Size(12.25, 0.08), budget=BUDGET, model=SHAPE)
    config = study(tmp_path, extra=given).config
    assert config.training.train_iters == 100
    if "{switch}" in ARMS[arm] and "relora" not in ARMS[arm]:
        assert config.inrank.switch_iters == 25


def test_equal_operations_give_cheaper_arms_more_steps():
    assert equal_flops_steps(300, dense=result(), arm=result(flops=60.0)) == 500
    assert equal_flops_steps(300, dense=result(), arm=result(flops=120.0)) == 250


def test_row_has_mean_and_sample_deviation():
    results = [
        result(test=t, flops=50.0, size=Size(r, 0.1)) for t, r in ((10.0, 11.0), (12.0, 12.0), (14.0, 13.0))
    ]
    found = row(FIRST, 2e-3, results, dense=result(), steps=7)
    assert (found["mean"], found["deviation"], found["rank"]) == (12.0, 2.0, 12.0)
    assert (found["FLOPs_over_dense"], found["lr"], found["steps"]) == (0.5, 0.002, 7)
    one = row("dense", 1e-3, results[:1], dense=result(), steps=7)
    assert one["deviation"] is None


def study(output: Path, *, extra=(), jobs=0) -> compare.Study:
    given_flags = (*MODEL.split(), "--train-iters", "100", *extra)
    return compare.Study(
        output=output,
        flags=given_flags,
        rates=(1e-3, 2e-3),
        seeds=(1, 2),
        budget=0.3,
        multiplier=4.0,
        jobs=jobs,
        notify=print,
    )


def leave(plan: compare.Study, arm: str, *, rate: float, seed: int, valid: float, test: float) -> None:
    """The parts of a run folder that are read, for two steps of 32 tokens at 1000 and 500 operations each."""
    folder = plan.folder(arm, rate=rate, seed=seed, steps=100)
    folder.mkdir(parents=True)
    steps = [
        {"kind": "train", "step": n, "phase": n, "tokens": 32 * n, "tokens_per_second": 10.0,
         "mean_rank": 4.0, "tflops_per_second": 10.0 * flops / 1e12, "elapsed_seconds": float(n)}
        for n, flops in ((1, 1000), (2, 500))
    ]  # fmt: skip
    ends = [
        {"kind": "eval", "step": 2, "split": split, "perplexity": value, "loss": value / 2}
        for split, value in (("valid", valid), ("test", test))
    ]
    lines = "".join(f"{json.dumps(record)}\n" for record in steps + ends)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(flatten(plan.config)), encoding="utf-8")
    # Four linears of 64 x 256: 65,536 parameters; rank 4 in each has 5,120.
    sizes = {"dense": 100_000, "phase_1": None, "phase_2": 100_000 - 65_536 + 5_120}
    summary = {"finished": True, "parameters": sizes}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def test_what_finished_runs_left(tmp_path):
    plan = study(tmp_path)
    leave(plan, FIRST, rate=1e-3, seed=1, valid=9.0, test=8.0)
    found = compare.read_result(plan.folder(FIRST, rate=1e-3, seed=1, steps=100))
    assert found.flops == pytest.approx(32 * 1500) and found.seconds == 2.0
    assert found.size.share == pytest.approx(5_120 / 65_536) and found.size.rank == 4.0
    assert found.parameters == 39_584


def test_curves_of_all_finished_runs(tmp_path):
    plan = study(tmp_path)
    leave(plan, FIRST, rate=1e-3, seed=1, valid=9.0, test=8.0)
    leave(plan, "dense", rate=2e-3, seed=2, valid=7.0, test=8.0)
    plan.folder("dense", rate=1e-3, seed=2, steps=100).mkdir()
    first, second = compare.curves(plan)
    place = {"arm": "dense", "lr": 2e-3, "seed": 2, "steps": 100, "step": 2, "tokens": 64}
    assert first == place | {"flops": pytest.approx(32 * 1500), "valid_loss": 3.5}
    assert second["arm"] == FIRST and second["valid_loss"] == 4.5


def test_finished_runs_make_a_table_and_are_not_run_again(tmp_path, capsys):
    plan = study(tmp_path, jobs=1)
    for arm in ("dense", FIRST):
        for rate, seed in ((1e-3, 1), (2e-3, 1), (4e-3, 1), (2e-3, 2)):
            leave(plan, arm, rate=rate, seed=seed, valid=abs(rate - 2e-3), test=30 + seed)
    (tables,) = compare.measure(plan, ["dense", FIRST], equal_flops=False).values()
    assert [row["arm"] for row in tables] == ["dense", FIRST]
    assert all(row["test_perplexity"] == [31, 32] and row["lr"] == 2e-3 for row in tables)
    assert capsys.readouterr().out == ""


def test_found_size_is_the_mean_over_all_seeds(tmp_path, monkeypatch):
    plan = study(tmp_path)
    ranks = {}
    monkeypatch.setattr(compare, "_choice", lambda *_: 1e-3)
    monkeypatch.setattr(compare, "has_ended", lambda folder: folder.name in ranks)
    monkeypatch.setattr(
        compare,
        "read_result",
        lambda folder: result(size=ranks[folder.name]) if folder.name in ranks else None,
    )
    ranks["lr0.001-seed1-steps100"] = Size(14.0, 0.1)
    assert compare._found(plan) is None
    ranks["lr0.001-seed2-steps100"] = Size(15.5, 0.2)
    assert compare._found(plan) == Size(14.75, pytest.approx(0.15))


def test_half_a_grid_is_a_table_of_the_arms_whose_rate_is_known(tmp_path):
    plan = study(tmp_path)
    for rate in (*plan.rates, 4e-3):
        leave(plan, "dense", rate=rate, seed=1, valid=abs(rate - 2e-3), test=2.0)
    leave(plan, FIRST, rate=1e-3, seed=1, valid=1.0, test=2.0)
    tables = compare.measure(plan, list(ARMS), equal_flops=True)
    assert [row["arm"] for row in tables["equal steps"]] == ["dense"]
    assert tables["equal FLOPs"][0]["steps"] == 100


def test_a_folder_of_other_flags_is_refused(tmp_path):
    compare.measure(study(tmp_path), ["dense"], equal_flops=False)
    with pytest.raises(UserError, match="another --output"):
        compare.measure(study(tmp_path, extra=["--seed", "3"]), ["dense"], equal_flops=False)


def test_only_a_loss_without_bounds_counts_as_a_rate_that_was_tried(tmp_path):
    """Anything else that ends a run would end the next one, too."""
    plan = study(tmp_path, extra=["--train-data-path", str(tmp_path / "none.txt")], jobs=1)
    with pytest.raises(UserError, match=r"status 1, .*none.txt does not exist.*lr0.001-seed1-steps100.log"):
        compare.measure(plan, ["dense"], equal_flops=False)
    log, *_ = sorted(tmp_path.glob("dense/*.log"))
    assert "none.txt" in log.read_text()
    folder = log.with_suffix("")
    assert not compare.has_ended(folder)
    log.write_text("error: step 3: the loss is nan; nothing was updated.\nexit status 1\n")
    assert compare.has_ended(folder)
