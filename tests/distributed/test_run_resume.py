"""Checkpoints of one run, resumed on other topologies, in BF16, after its end, and where that is refused."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from inrank_megatron.checkpoint.folder import Checkpoint
from tests.distributed.launches import TINY, Launch, course, data_flags, last_step, launch, records
from tests.distributed.pausing import PAUSE, PHASE_FILE
from tests.unit.checkpoint.test_writing import write_version_2

PAUSING = Path(__file__).with_name("pausing.py")
STEPS = 16
LAUNCHER_LINE = re.compile(r"\[[-\d :,]+\] \[\w+\] \[(runner|launch|real_accelerator)\.py:\d+:")
OWN_LINE = re.compile(
    r"$|changed since the run began: |learning rate at step \d+: |resumed at step \d+ |step \d+[/:]|"
    r"it has learnt[ :]|(checkpoint|plots|report)  |what to run next:$|"
    r"  (first|its text|go on|real text|all curves)  | {15}\("
)
"""How each line begins that a run writes when it goes on."""
RUN = [
    *TINY,
    "--switch-iters",
    "8",
    "--eval-interval",
    "6",
    "--save-interval",
    "4",
    "--train-iters",
    str(STEPS),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_flags(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    """A finished run on two ranks with tensor parallelism 2."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run with spaces"
    args = [*RUN, *data, "--tensor-model-parallel-size", "2", "--save", str(folder)]
    finished = launch(args, launcher="torchrun", num_procs=2)
    assert finished.process.returncode == 0, finished.stderr
    assert finished.stderr == "", "third parties speak"
    return folder


def copied(run: Path, target: Path, *, step: int) -> Path:
    """A copy of the run as it was after ``step``, records of later steps included, as after a kill."""
    shutil.copytree(run, target)
    for checkpoint in (target / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    return target


def close(first: dict, second: dict) -> None:
    """The same course within the rounding of another order of sums."""
    for kind in ("train", "eval"):
        assert len(first[kind]) == len(second[kind])
        for one, other in zip(first[kind], second[kind], strict=True):
            assert one == pytest.approx(other, rel=1e-5) if kind == "train" else one[:2] == other[:2]
            assert one[-2] == pytest.approx(other[-2], rel=1e-5)
    schedules = [
        [(r["step"], r["layer"], r["rank"], r["event"]) for r in c["ranks"]] for c in (first, second)
    ]
    assert schedules[0] == schedules[1]


@pytest.mark.parametrize(("step", "launcher", "num_procs"), [(4, "forked", 2), (12, "python", 1)])
def test_resume_on_another_topology_matches(undisturbed, data, tmp_path, step, launcher, num_procs):
    run = copied(undisturbed, tmp_path / "run", step=step)
    args = [*RUN, *data, "--tensor-model-parallel-size", "1", "--save", str(run), "--resume", "auto"]
    resumed = launch(args, launcher=launcher, num_procs=num_procs)
    assert resumed.process.returncode == 0, resumed.stderr
    assert f"resumed at step {step}" in resumed.stdout
    assert "tensor_model_parallel_size 2 -> 1" in resumed.stdout
    close(course(run), course(undisturbed))


# At a rate at which training is smooth: one at which losses jump magnifies any rounding. At the checkpoint of
# step 12 a rank check is under way.
LONG = [
    *(*TINY, "--switch-iters", "14", "--save-interval", "6", "--train-iters", "68", "--lr", "2e-4"),
    "--overlap-rank-check",
]


@pytest.fixture(scope="module")
def long(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("long") / "run"
    args = [*LONG, *data, "--tensor-model-parallel-size", "2", "--save", str(folder)]
    assert launch(args, num_procs=2).process.returncode == 0
    return folder


@pytest.mark.parametrize(("step", "phase"), [(12, 1), (18, 2)])
def test_resume_on_another_topology_and_zero_stage_matches_over_fifty_steps(
    long, data, tmp_path, step, phase
):
    run = copied(long, tmp_path / "run", step=step)
    args = [*LONG, *data, "--save", str(run), "--resume", "auto"]
    there = ["--tensor-model-parallel-size", "1", "--zero-stage", "3"]
    resumed = launch([*args, *there], num_procs=2)
    assert resumed.process.returncode == 0, resumed.stderr
    assert f"resumed at step {step}" in resumed.stdout and "zero_stage 1 -> 3" in resumed.stdout
    here, elsewhere = records(long, "train"), records(run, "train")
    assert here[step - 1]["phase"] == phase and len(elsewhere) == len(here) >= step + 50
    for one, other in zip(here, elsewhere, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert [r["rank"] for r in records(run, "ranks")] == [r["rank"] for r in records(long, "ranks")]
    assert [r["step"] for r in records(run, "ranks") if r["event"] == "check"][::4] == [5, 9, 13]
    state = json.loads((long / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
    assert (state["identity"]["overlap_rank_check"], state["rank_check_under_way"]) == (True, step == 12)


def test_resume_from_an_older_step_keeps_later_checkpoints(undisturbed, data, tmp_path):
    """To a step that is named; later checkpoints stay until their step comes, and --resume can name them."""
    run = copied(undisturbed, tmp_path / "run", step=STEPS)
    args = [*RUN, *data, "--tensor-model-parallel-size", "1", "--save", str(run)]
    absent = launch([*args, "--resume", "5"])
    assert absent.process.returncode == 1 and absent.stderr.count("\n") == 1
    assert "has no checkpoint of that step, there are those of steps 4, 8, 12, 16; name one" in absent.stderr
    stamp = (run / "checkpoints" / "step_00000016" / "manifest.json").stat().st_mtime_ns
    paused = tmp_path / "paused"
    env = {PAUSE: "a step/6/3", PHASE_FILE: str(paused)}  # so that it has not ended when SIGTERM comes
    with Launch([*args, "--resume", "4"], script=PAUSING, env=env) as back:
        back.until(paused.exists, "step 10")
        back.process.terminate()
        back.wait()
    assert "goes back to step 4" in back.stdout and "(step 8, 12, 16) stay aside" in back.stdout
    step = last_step(run)
    assert 10 <= step < STEPS
    assert (run / "checkpoints" / "step_00000016" / "manifest.json").stat().st_mtime_ns == stamp
    on = launch([*args, "--resume", "auto"])
    assert on.process.returncode == 0, on.stderr
    assert f"resumed at step {step}" in on.stdout
    close(course(run), course(undisturbed))


def test_bf16_resume_with_dropout_from_version_2_is_bitwise_equal(data, tmp_path):
    args = [*TINY, *data, "--bf16", "--hidden-dropout", "0.1", "--switch-iters", "6", "--save-interval", "4"]
    args += ["--train-iters", "8"]
    assert launch([*args, "--save", str(tmp_path / "a")], num_procs=2).process.returncode == 0
    run = copied(tmp_path / "a", tmp_path / "b", step=4)
    newest = run / "checkpoints" / "step_00000004"
    checkpoint = Checkpoint(newest)  # as the version before had it
    tensors = dict(checkpoint.tensors(checkpoint.names))
    shutil.rmtree(newest)
    write_version_2(newest, tensors, checkpoint.state)
    broken = shutil.copytree(newest, newest.with_name("step_00000005"))
    (broken / "state.json").write_text("{}")
    (run / "checkpoints" / ".step_00000007.partial").mkdir()
    resumed = launch([*args, "--save", str(run), "--resume", "auto"], num_procs=2)
    assert resumed.process.returncode == 0, resumed.stderr
    assert "skipped a broken checkpoint" in resumed.stdout and "step_00000005" in resumed.stdout
    assert course(run) == course(tmp_path / "a")
    assert not list((run / "checkpoints").glob(".*"))


def test_resume_after_a_stop_in_the_last_evaluation(undisturbed, data, tmp_path):
    run = copied(undisturbed, tmp_path / "run", step=STEPS)
    (run / "summary.json").unlink()
    metrics = run / "metrics.jsonl"
    kept = metrics.read_text().splitlines(keepends=True)[:-1]
    metrics.write_text("".join(kept))
    args = [*RUN, *data, "--tensor-model-parallel-size", "1", "--save", str(run), "--resume", "auto"]
    resumed = launch(args)
    assert resumed.process.returncode == 0, resumed.stderr
    assert metrics.read_text().startswith("".join(kept))
    close(course(run), course(undisturbed))


def test_finished_run_prints_a_command_that_extends_it(undisturbed, data, tmp_path):
    run = copied(undisturbed, tmp_path / "run with spaces", step=STEPS)
    args = [*RUN, *data, "--tensor-model-parallel-size", "1", "--save", str(run), "--resume", "auto"]
    with FileLock(run / ".lock"):
        second = launch(args)
    assert second.process.returncode == 1
    assert "another job is running in it" in second.stderr and second.stderr.count("\n") == 1
    finished = launch(args)
    assert finished.process.returncode == 0, finished.stderr
    assert f"has all its {STEPS} steps" in finished.stdout
    assert course(run) == course(undisturbed)
    go_on = next(line for line in finished.stdout.splitlines() if line.startswith("  go on"))
    command, *words = shlex.split(go_on.removeprefix("  go on"))
    assert (command, words[:3]) == ("deepspeed", ["--num_gpus", "2", "launch/pretrain_gpt2.py"])
    longer = launch(words[3:], launcher="deepspeed", num_procs=2)
    assert longer.process.returncode == 0, longer.stderr
    others = [line for line in longer.stdout.splitlines() if not LAUNCHER_LINE.match(line)]
    assert longer.stderr == "" and not [line for line in others if not OWN_LINE.match(line)], others
    assert [r["step"] for r in records(run, "train")] == list(range(1, 2 * STEPS + 1))
    check_records(run, steps=2 * STEPS)


def check_records(run: Path, *, steps: int) -> None:
    seconds = [record["elapsed_seconds"] for record in records(run, "train")]
    assert seconds == sorted(seconds)
    assert records(run, "train")[-1]["tokens"] == steps * 4 * 64
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"] is True and summary["steps"] == steps
    assert summary["train_seconds"] >= seconds[-1]
    parameters = summary["parameters"]
    assert parameters["phase_1"] > parameters["dense"] > parameters["phase_2"]


REFUSALS = {
    "holds another run": ["--seed", "7"],
    "holds this run already; continue it with --resume auto": [],
}


@pytest.mark.parametrize("message", REFUSALS)
def test_occupied_run_folder_is_refused_on_every_rank(undisturbed, data, message):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    args = [*RUN, *data, "--tensor-model-parallel-size", "2", "--save", str(undisturbed), *REFUSALS[message]]
    refused = launch(args, num_procs=2)
    assert refused.process.returncode != 0
    for rank in (0, 1):
        lines = [line for line in refused.stderr.splitlines() if line.startswith(f"rank {rank}: ")]
        assert len(lines) == 1 and message in lines[0]
    assert 'pretrain_gpt2.py", line' not in refused.stderr, "a traceback"
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_changed_data_or_no_complete_checkpoint_is_refused(undisturbed, data, tmp_path):
    run = copied(undisturbed, tmp_path / "run", step=4)
    corpus = Path(data[1])
    text = corpus.read_text()
    args = [*RUN, *data, "--save", str(run), "--tensor-model-parallel-size", "1", "--resume", "auto"]
    try:
        corpus.write_text(text.replace("the ", "a ", 1))
        changed = launch(args)
        others = launch([*args, "--tokenizer", str(run / "tokenizer")])
    finally:
        corpus.write_text(text)
    assert changed.process.returncode == others.process.returncode == 1
    assert "another tokenizer" in changed.stderr and changed.stderr.count("\n") == 1
    assert "was trained on data" in others.stderr and others.stderr.count("\n") == 1
    (run / "checkpoints" / "step_00000004" / "index.json").unlink()
    broken = launch(args)
    assert broken.process.returncode == 1
    assert "none of its checkpoints is complete" in broken.stderr and broken.stderr.count("\n") == 1
