"""The last screen of a run: what it has learnt, and commands that work as printed."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from inrank_megatron.config.cli import parse
from inrank_megatron.reporting.learnt import tells_of_words
from inrank_megatron.reporting.report import write_report
from inrank_megatron.training.closing import last_lines
from inrank_megatron.training.schedule import learning_rate

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    """As a user who has started the program there with DeepSpeed's launcher."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(sys, "argv", ["launch/pretrain_gpt2.py"])


def commands(run_dir: Path, **options) -> dict[str, list[str]]:
    lines = last_lines(run_dir, **options).splitlines()
    wanted = ("its text", "go on", "real text", "all curves")
    return {line[2:15].strip(): shlex.split(line[15:]) for line in lines if line[2:15].strip() in wanted}


def test_paths_and_commands_are_printed(make_run):
    run_dir = make_run("with space")
    assert "report      none yet: python tools/report.py '" in last_lines(run_dir)
    (run_dir / "report.html").touch()
    text, found = last_lines(run_dir), commands(run_dir)
    assert f"checkpoint  {run_dir}/checkpoints/step_00000120" in text
    assert f"report      {run_dir}/report.html" in text
    launch = ["deepspeed", "--num_gpus", "2", "launch/pretrain_gpt2.py"]
    assert found["go on"] == [*launch, "--save", str(run_dir), "--resume", "auto", "--train-iters", "240"]
    assert found["real text"][:5] == [*launch, "--inrank"]
    assert found["its text"] == ["python", "tools/generate.py", str(run_dir), "--prompt", "The"]
    assert found["all curves"] == ["tensorboard", "--logdir", f"{run_dir}/tensorboard"]


@pytest.mark.parametrize(
    ("argv", "environment", "words"),
    [
        (
            f"{ROOT}/launch/pretrain_gpt2.py",
            {},
            ["deepspeed", "--num_gpus", "2", "launch/pretrain_gpt2.py"],
        ),
        (
            "x/pretrain_gpt2.py",
            {"LOCAL_SIZE": "1"},
            ["deepspeed", "--hostfile", "HOSTFILE", "x/pretrain_gpt2.py"],
        ),
        (
            "x/pretrain_gpt2.py",
            {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2"},
            ["torchrun", "--nproc-per-node", "2", "x/pretrain_gpt2.py"],
        ),
        (
            "x/pretrain_gpt2.py",
            {"LOCAL_SIZE": None, "SLURM_PROCID": "0"},
            ["srun", "python", "x/pretrain_gpt2.py"],
        ),
        (
            "x/pretrain_gpt2.py",
            {
                **{"LOCAL_SIZE": None, "TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "1"},
                **{"GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node-1"},
            },
            [
                *("torchrun", "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "node-1:29500"),
                *("--nproc-per-node", "1", "x/pretrain_gpt2.py"),
            ],
        ),
        (
            "x/pretrain_gpt2.py",
            {
                **{"LOCAL_SIZE": None, "SLURM_PROCID": "0", "SLURM_NNODES": "2"},
                **{"LOCAL_WORLD_SIZE": "1"},
            },
            ["srun", "--nodes", "2", "--ntasks", "2", "python", "x/pretrain_gpt2.py"],
        ),
        (
            "x/pretrain_gpt2.py",
            {
                **{"LOCAL_SIZE": None, "OMPI_COMM_WORLD_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
                **{"MASTER_ADDR": "node-1", "MASTER_PORT": "4"},
            },
            [
                *("mpirun", "-n", "2", "--hostfile", "HOSTFILE", "--map-by", "slot", "--bind-to", "none"),
                *("-x", "MASTER_ADDR=node-1", "-x", "MASTER_PORT=4", "-x", "PATH", "python"),
            ],
        ),
    ],
    ids=[
        *("absolute", "two nodes", "torchrun", "srun"),
        *("torchrun on two nodes", "srun on two nodes", "mpirun on two nodes"),
    ],
)
def test_the_program_is_started_as_it_was(make_run, monkeypatch, argv, environment, words):
    monkeypatch.setattr(sys, "argv", [argv])
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    assert commands(make_run())["go on"][: len(words)] == words


def test_from_another_folder_the_paths_are_whole(make_run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_dir = make_run()
    assert commands(run_dir)["its text"][1] == f"{ROOT}/tools/generate.py"
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["world"]["device"] = "NVIDIA H200"
    (run_dir / "summary.json").write_text(json.dumps(summary))
    assert commands(run_dir)["real text"][-1] == f"{ROOT}/configs/gpt2_small_inrank.yaml"


@pytest.mark.parametrize(
    ("changed", "flags", "rates"),
    [
        ({}, [], "goes from 0 back to 0.000493 at step 121, then down to 0"),
        (
            {"lr_decay_iters": 60, "min_lr": 1e-4},
            ["--lr-decay-iters", "240"],
            "goes from 0.0001 back to 0.000544 at step 121, then down to 0.0001",
        ),
        ({"lr_decay_style": "constant"}, [], "stays at 0.001"),
    ],
    ids=["cosine", "own decay", "constant"],
)
def test_learning_rate_of_a_resumed_run_is_stated(make_run, changed, flags, rates):
    """The flags that are printed give the rate that is printed."""
    run_dir = make_run(**changed)
    words = commands(run_dir)["go on"]
    assert words[-2 - len(flags) :] == ["--train-iters", "240", *flags]
    assert f"(the learning rate {rates})" in last_lines(run_dir)
    config = parse(words[words.index("--save") :], world_size=2).config
    if "stays" not in rates:
        assert f"{learning_rate(121, config):.3g}" in rates and rates.endswith(
            f"{learning_rate(240, config):.3g}"
        )


def test_an_unfinished_run_goes_on_as_it_was_planned(make_run):
    assert "--train-iters" not in last_lines(make_run(steps=47))


def test_a_deepspeed_json_is_needed_again(make_run):
    assert commands(make_run(), deepspeed_config="my ds.json")["go on"][-2:] == [
        "--deepspeed-config",
        "my ds.json",
    ]


def test_summary_starts_with_the_perplexity(make_run):
    run_dir = make_run()
    sample = {
        "step": 120,
        "prompt": "Assignment\n****\n\nnames to values and",
        "text": " a code\n\n\n\nas a default",
    }
    (run_dir / "sample.json").write_text(json.dumps(sample | {"temperature": 0.8, "top_p": 0.95, "seed": 0}))
    first, given, written, *_ = last_lines(run_dir).splitlines()
    assert first == (
        "it has learnt: validation perplexity 62.75 (unigram 402, uniform 4,096); 62% of the dense model's "
        "parameters, mean rank 12.5"
    )
    assert given == 'it writes after "Assignment **** names to values and":'
    assert written == "    a code as a default"
    assert commands(run_dir)["its text"][-1] == "Assignment names"
    metrics = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(
        metrics.replace('"word_perplexity": 2', '"word_perplexity": 2191335')
    )
    page = write_report(run_dir).read_text()
    leads, is_there = "perplexity (word)" in page, "219 M" in page  # a diff of the page would take minutes
    assert (leads, is_there) == (False, True)
    places = [page.find(text) for text in ("It has learnt", "<i>Assignment\n****", "a default", "<img")]
    assert -1 not in places and places == sorted(places)


def test_a_model_worse_than_counting_has_not_learnt(make_run):
    run_dir = make_run()
    summary = json.loads((run_dir / "summary.json").read_text()) | {"unigram_perplexity": {"valid": 50.0}}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    assert last_lines(run_dir).startswith(
        "it has learnt little yet: validation perplexity 62.75 (unigram 50,"
    )


def test_a_run_without_records(tmp_path):
    assert last_lines(tmp_path).startswith("checkpoint  none yet")
    assert os.listdir(tmp_path) == []


def test_word_level_perplexity_leads_where_it_says_something(make_run):
    """2,191,335 for a book does not; it stays among the evaluations."""
    assert tells_of_words(38.2, 50257) and not tells_of_words(2_191_335.0, 4096)
    assert not tells_of_words(None, 4096) and not tells_of_words(38.2, None)
