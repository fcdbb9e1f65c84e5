"""The memory that ``--dry-run`` states, for a run that has trained."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.plan import make_plan
from inrank_megatron.config.topology import topology_of
from inrank_megatron.reporting.predicted import predicted_memory
from inrank_megatron.reporting.run import read_run

MakeRun = Callable[..., Path]


def test_dense_and_the_first_phase_are_those_of_the_plan(make_run: MakeRun) -> None:
    run = read_run(make_run())
    config = from_flat(run.settings)
    topology = topology_of(config, world_size=2, vocab_size=4096)
    phases = make_plan(config, topology, vocab_size=4096, device="cpu").phases
    found = predicted_memory(run)
    assert list(found) == ["dense", "phase_1", "phase_2"]
    assert found["dense"] == phases[0].memory.total
    assert found["phase_1"] == next(phase for phase in phases if phase.shape.is_largest).memory.total


def test_the_second_phase_has_the_run_s_own_ranks(make_run: MakeRun) -> None:
    run = read_run(make_run())
    before = predicted_memory(run)
    wider = [record | {"active_columns": 2 * record["active_columns"]} for record in run.ranks]
    after = predicted_memory(replace(run, ranks=wider))
    assert after["phase_2"] > before["phase_2"]
    assert [after[name] for name in ("dense", "phase_1")] == [before[name] for name in ("dense", "phase_1")]


def test_phases_that_were_not_reached_are_left_out(make_run: MakeRun) -> None:
    run = read_run(make_run())
    first = replace(run, train=[record for record in run.train if record["phase"] == 1])
    assert list(predicted_memory(first)) == ["dense", "phase_1"]


def test_nothing_is_said_without_settings_processes_or_factors(make_run: MakeRun) -> None:
    run = read_run(make_run())
    assert predicted_memory(replace(run, settings={"method": "inrank"})) == {}
    assert predicted_memory(replace(run, summary={})) == {}
    assert predicted_memory(read_run(make_run("dense", method="dense"))) == {}
    of_three = run.summary | {"world": run.summary["world"] | {"size": 3}}
    uneven = replace(run, summary=of_three, settings=run.settings | {"tensor_model_parallel_size": 2})
    assert predicted_memory(uneven) == {}, "settings that no launch would take"
