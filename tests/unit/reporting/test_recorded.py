"""A low-rank run is laid beside a recorded dense run of its settings and text, and beside no other."""

import json

import pytest

from inrank_megatron.config.cli import parse
from inrank_megatron.config.loading import flatten
from inrank_megatron.reporting import recorded
from inrank_megatron.reporting.recorded import dense_settings, recorded_dense, unigram_perplexity
from inrank_megatron.reporting.run import read_run
from inrank_megatron.training.closing import last_lines


@pytest.fixture
def settings(make_run, tmp_path, monkeypatch) -> dict:
    """Of the dense run that belongs to the others here; another is recorded before it."""
    run = read_run(make_run("dense", method="dense"))
    made = {
        "settings": dense_settings(run),
        "unigram_perplexity": unigram_perplexity(run),
        "perplexity": {"valid": 40.0, "test": 41.0},
    }
    path = tmp_path / "records.json"
    path.write_text(json.dumps([made | {"settings": made["settings"] | {"lr": 7.0}}, made]))
    monkeypatch.setattr(recorded, "RECORDS", path)
    return made["settings"]


def test_the_last_lines_name_what_dense_training_reached(make_run, settings):
    assert {"hidden_size", "lr", "train_iters"} <= settings.keys() and "factor_optimizer" not in settings
    assert last_lines(make_run()).splitlines()[1] == (
        "a recorded dense run of the same settings ended at validation perplexity 40"
    )


def test_a_dense_run_is_not_laid_beside_itself(make_run, settings):
    assert recorded_dense(read_run(make_run(method="dense"))) is None


@pytest.mark.parametrize(("unigram", "counts"), [(1.01, True), (1.05, False)])
def test_the_text_must_be_the_same(make_run, settings, unigram, counts):
    run = read_run(make_run())
    run.summary["unigram_perplexity"]["valid"] *= unigram
    assert (recorded_dense(run) is not None) is counts


@pytest.mark.parametrize("name", ["hidden_size", "lr", "train_iters"])
def test_other_settings_have_no_record(make_run, settings, name):
    run = read_run(make_run())
    run.settings[name] *= 2
    assert recorded_dense(run) is None


def test_a_run_that_does_not_say_what_it_is_has_no_record(make_run, settings):
    run = read_run(make_run())
    del run.summary["unigram_perplexity"]
    assert recorded_dense(run) is None


def test_the_first_run_has_a_record():
    """Of its own settings, by which it can be found."""
    records = json.loads(recorded.RECORDS.read_text())
    first = flatten(parse([], world_size=1).config)
    assert any(record["settings"] == {name: first[name] for name in record["settings"]} for record in records)
