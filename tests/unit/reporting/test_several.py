"""Several runs on one page: what it says of them, what it refuses, and what it writes where."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from inrank_megatron.errors import UserError
from inrank_megatron.reporting.several import (
    MOST_RUNS,
    not_comparable,
    read_runs,
    titles,
    write_comparison,
)
from tests.forked import run_forked
from tests.unit.reporting.test_report import Page

TOOL = Path(__file__).resolve().parents[3] / "tools" / "report.py"
MakeRun = Callable[..., Path]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def change_summary(run: Path, **changed) -> Path:
    path = run / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return run


def test_a_page_of_three_runs(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("low"), make_run("dense", method="dense"), make_run("cut", steps=47, lr=0.5)]
    before = contents(tmp_path)
    page = Page(write_comparison(runs, tmp_path / "page.html"))
    assert contents(tmp_path).items() - before.items() == {
        (tmp_path / "page.html", (tmp_path / "page.html").read_bytes())
    }, "the runs' own folders are left alone"
    text = " ".join(page.text)
    assert "3 runs side by side" in text and "A: low; B: dense; C: cut" in text
    assert "C has not finished." in text and "comparable" not in text
    assert page.tags.count("img") == 3 and len(page.references) == 3
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.text[page.text.index("lr") :][:4] == ["lr", "0.001", "0.001", "0.5"]
    assert "num_layers" not in text, "alike in all"


def test_runs_of_one_name_are_told_apart_by_their_paths(make_run: MakeRun, tmp_path: Path) -> None:
    runs = read_runs([make_run("old/low"), make_run("new/low"), make_run("dense")])
    assert titles(runs) == {"A": str(tmp_path / "old/low"), "B": str(tmp_path / "new/low"), "C": "dense"}


def test_runs_of_other_texts_and_machines_are_not_comparable(make_run: MakeRun) -> None:
    other = {"world": {"size": 8, "tensor_model_parallel_size": 2, "data_parallel_size": 4, "device": "H100"}}
    runs = read_runs(
        [
            make_run("a"),
            change_summary(make_run("b"), vocab_size=50257, unigram_perplexity={"valid": 640.25}, **other),
            make_run("c", steps=20),
        ]
    )
    assert not_comparable(runs) == [
        "Losses and perplexities are not comparable: different vocabularies (A 4,096, B 50,257); different "
        "validation texts (perplexities of a unigram model) (A 402, B 640.25).",
        "Times, memory and tokens/s are not comparable: different processes or devices (A 2 x cpu, "
        "B 8 x H100).",
    ]
    longer = read_runs([make_run("d"), make_run("e", seq_length=512)])
    assert not_comparable(longer) == [
        "Losses and perplexities are not comparable: different sequence lengths (A 256, B 512)."
    ]


def test_settings_that_no_run_writes_are_compared_as_they_are(make_run: MakeRun) -> None:
    """A `config.yaml` edited by hand can hold a mapping where a number belongs, and a mapping has no hash."""
    runs = read_runs([make_run("a"), make_run("b", seq_length={"x": None})])
    assert "sequence lengths (A 256, B {'x': None})" in not_comparable(runs)[0]


def test_folders_that_are_no_runs(make_run: MakeRun, tmp_path: Path) -> None:
    run, output = make_run(), tmp_path / "page.html"
    (tmp_path / "empty").mkdir()
    started = make_run("started", steps=0)
    damaged = make_run("damaged")
    (damaged / "summary.json").write_text("{")
    for folder, words in (
        (tmp_path / "absent", "absent is not a run folder"),
        (run / "config.yaml", "config.yaml is not a run folder"),
        (tmp_path / "empty", "empty: not a run folder, it has no config.yaml"),
        (started, "started: its metrics.jsonl has no step yet"),
        (damaged, "summary.json cannot be parsed"),
        (tmp_path / "empty" / ".." / "run", "is named twice"),
    ):
        with pytest.raises(UserError, match=words):
            write_comparison([run, folder], output)
    with pytest.raises(UserError, match=f"13 runs: a page shows at most {MOST_RUNS}"):
        write_comparison([run] * (MOST_RUNS + 1), output)
    assert not output.exists()


def test_only_a_page_of_several_runs_is_replaced(make_run: MakeRun, tmp_path: Path) -> None:
    runs, output = [make_run("a"), make_run("b")], tmp_path / "page.html"
    write_comparison(runs, output)
    first = output.read_text()
    write_comparison([*runs, make_run("c")], output)
    assert output.read_text() != first
    output.write_text("precious")
    with pytest.raises(UserError, match="exists and is no page of several runs"):
        write_comparison(runs, output)
    assert output.read_text() == "precious"
    for place, words in ((tmp_path, "is a folder"), (tmp_path / "absent" / "page.html", "does not exist")):
        with pytest.raises(UserError, match=words):
            write_comparison(runs, place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "page.html"]


def test_the_report_of_a_run_is_not_replaced_by_a_page_of_several(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b")]
    done = run_forked(TOOL, runs[0])
    assert done.returncode == 0, done.stderr
    with pytest.raises(UserError, match="exists and is no page of several runs"):
        write_comparison(runs, runs[0] / "report.html")


def test_runs_with_the_least_on_record(make_run: MakeRun, tmp_path: Path) -> None:
    """Neither summary nor evaluation nor rank: what is not known is left out."""
    runs = [make_run(name, method="dense", steps=3) for name in ("a", "b")]
    (runs[1] / "config.yaml").write_text(yaml.safe_dump({"method": "dense"}))
    text = " ".join(Page(write_comparison(runs, tmp_path / "page.html")).text)
    assert "FLOPs are not known of A, B." in text and "A has not finished. B has not finished." in text


def test_the_tool_writes_where_it_is_called_or_told(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [str(make_run("a")), str(make_run("b"))]
    command = [sys.executable, str(TOOL), *runs]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "comparison.html\n"), done.stderr
    done = run_forked(TOOL, *runs, "--output", str(tmp_path / "b" / "config.yaml"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    done = run_forked(TOOL, runs[0], "--output", str(tmp_path / "page.html"))
    assert done.returncode == 2 and "--output is for several runs" in done.stderr
    assert not (tmp_path / "page.html").exists()
