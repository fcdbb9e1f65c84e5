"""Launches whose numbers stop being finite: FP16 finds its loss scale, a diverged run ends and is resumed."""

import json

import pytest

from tests.distributed.launches import ADAMW, TINY, data_flags, launch, records

RUN = [*TINY, *ADAMW, "--tensor-model-parallel-size", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_flags(tmp_path_factory.mktemp("data"))


@pytest.mark.timeout(600)
def test_fp16_recovers_from_a_huge_initial_loss_scale(data, tmp_path):
    """The first steps are skipped, a rank check among them; the run goes to its end and its report."""
    folder = tmp_path / "run"
    args = [*RUN, *data, "--fp16", "--initial-loss-scale", str(2.0**40), "--switch-iters", "28"]
    args += ["--train-iters", "36", "--save", str(folder)]
    run = launch(args, num_procs=2)
    assert run.process.returncode == 0, run.stderr
    assert run.stderr == "", "third parties speak"
    steps = records(folder, "train")
    lost = [record["step"] for record in steps if record["grad_norm"] is None]
    assert lost == list(range(1, len(lost) + 1)) and 4 < len(lost) < 28
    assert steps[-1]["skipped_steps"] == len(lost)
    assert steps[0]["loss_scale"] == 2.0**40 and steps[-1]["loss_scale"] == 2.0 ** (40 - len(lost) + 1)
    assert run.stdout.count("overflow, nothing is updated") == len(lost)
    checked = {record["step"] for record in records(folder, "ranks") if record["event"] == "check"}
    assert checked == {step for step in range(4, 29, 4) if step not in lost}
    # The start knows the first batch from its gradient; the second is lost too, and so before any update.
    assert steps[-1]["phase"] == 2 and steps[-1]["loss"] < steps[1]["loss"]
    assert "<img" in (folder / "report.html").read_text() and list((folder / "plots").glob("loss.png"))
    assert json.loads((folder / "summary.json").read_text())["finished"] is True


@pytest.mark.timeout(600)
def test_diverged_run_stops_and_resumes_from_its_last_checkpoint(data, tmp_path):
    folder = tmp_path / "run"
    run = [*RUN, *data, "--switch-iters", "2", "--save-interval", "3", "--save", str(folder)]
    assert launch([*run, "--train-iters", "3"]).process.returncode == 0
    go_on = [*run, "--train-iters", "6", "--resume", "auto"]
    wild = launch([*go_on, "--lr", "1e30"], num_procs=2)
    assert wild.process.returncode != 0
    errors = [line for line in wild.stderr.splitlines() if ": error: " in line]
    assert [line.partition(": error: ")[0] for line in sorted(errors)] == ["rank 0", "rank 1"], wild.stderr
    assert len({line.partition(": error: ")[2] for line in errors}) == 1
    assert ": error: step 5: the loss is nan; nothing was updated. the " in errors[0], errors[0]
    assert "not finite on rank 0, 1" in errors[0] and "--resume auto" in errors[0], errors[0]
    assert 'pretrain_gpt2.py", line' not in wild.stderr, "a traceback"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000003"]
    calm = launch([*go_on, "--lr", "1e-4", "--zero-stage", "3", "--offload-optimizer"])
    assert calm.process.returncode == 0, calm.stderr
    assert "resumed at step 3" in calm.stdout and "lr 1e+30 -> 0.0001" in calm.stdout
    assert "zero_stage 1 -> 3, offload_optimizer False -> True" in calm.stdout
    assert [record["step"] for record in records(folder, "train")] == [1, 2, 3, 4, 5, 6]
