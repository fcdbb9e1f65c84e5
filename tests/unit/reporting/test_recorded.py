"""A low-rank run is laid beside a recorded dense run of the same configuration, and beside no other."""

import json

import pytest

from inrank_megatron.reporting import recorded
from inrank_megatron.reporting.recorded import fingerprint, recorded_dense
from inrank_megatron.reporting.run import read_run
from inrank_megatron.training.closing import last_lines


@pytest.fixture
def record(make_run, tmp_path, monkeypatch) -> dict:
    """Of the dense run that belongs to the others here."""
    made = fingerprint(read_run(make_run("dense", method="dense"))) | {
        "perplexity": {"valid": 40.0, "test": 41.0}
    }
    path = tmp_path / "records.json"
    path.write_text(json.dumps([made | {"steps": 7}, made]))
    monkeypatch.setattr(recorded, "RECORDS", path)
    return made


def test_the_last_lines_name_what_dense_training_reached(make_run, record):
    assert None not in record.values()
    assert last_lines(make_run()).splitlines()[1] == (
        "dense training of this configuration, in a recorded run, ended its 120 steps at validation "
        "perplexity 40"
    )


def test_a_dense_run_is_not_laid_beside_itself(make_run, record):
    assert recorded_dense(read_run(make_run(method="dense"))) is None


@pytest.mark.parametrize(("unigram", "counts"), [(1.01, True), (1.05, False)])
def test_the_text_must_be_the_same(make_run, record, unigram, counts):
    run = read_run(make_run())
    run.summary["unigram_perplexity"]["valid"] *= unigram
    assert (recorded_dense(run) is not None) is counts


@pytest.mark.parametrize("name", ["vocab_size", "steps"])
def test_another_configuration_has_no_record(make_run, record, name):
    run = read_run(make_run())
    run.summary[name] += 1
    assert recorded_dense(run) is None


def test_a_run_that_does_not_say_what_it_is_has_no_record(make_run, record):
    run = read_run(make_run())
    del run.summary["unigram_perplexity"]
    assert recorded_dense(run) is None


def test_the_records_are_whole():
    for made in json.loads(recorded.RECORDS.read_text()):
        assert None not in made.values() and set(made["perplexity"]) == {"valid", "test"}
