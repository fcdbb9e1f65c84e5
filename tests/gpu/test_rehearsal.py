"""`tests/gpu.sh` rehearsed: all of it but the device. With `--rehearse N` it rehearses every case itself."""

import json
import re
import shutil
import subprocess
import sys
import time

import psutil
import pytest

from inrank_megatron.config.checks import check
from tests.contract.layouts import Layout
from tests.contract.sessions import configuration
from tests.gpu import machine, programs
from tests.gpu.__main__ import LEAST_MINUTES, _parse
from tests.gpu.cases import METHODS, cases, chosen
from tests.gpu.command import LEFT, UNUSABLE
from tests.gpu.failures import CaseFailure, last_lines
from tests.gpu.figures import Figure
from tests.gpu.limits import bound_of, value_of
from tests.gpu.pool import START_SECONDS, Pool
from tests.gpu.results import RECORDS, REPORT
from tests.gpu.runner import CHECK_SECONDS
from tests.gpu.table import JSON_MARK
from tests.harness import ROOT

LAYER = "layers/TP1/float32/row U V"


def gpu_tests(*arguments: str) -> subprocess.CompletedProcess:
    """As `tests/gpu.sh` starts it, after the installation."""
    command = [sys.executable, "-m", "tests.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_a_rehearsal_goes_on_where_it_ended_and_leaves_one_file(tmp_path):
    """A layer on a rank against the oracle; of a second case somebody has left a failure."""
    folder = ["--rehearse", "--results", str(tmp_path), "--only"]
    done = gpu_tests(*folder, LAYER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"{re.escape(LAYER)} +largest relative .* +1e-05 +pass\n", done.stdout)
    other = "measured/wire"
    failed = {"name": other, "state": "hung", "seconds": 3.0, "figures": [], "error": "rank 1 is silent"}
    with (tmp_path / RECORDS).open("a") as file:
        file.write(json.dumps(failed | {"commit": "", "ended": ""}) + "\n" + '{"name": "cut by a ki')
    again = gpu_tests(*folder, LAYER, other)
    assert again.returncode == 1 and " ... " not in again.stdout, "nothing was left to run"
    assert "2 of 2 cases done" in again.stdout and f"{other}: hung\nrank 1 is silent" in again.stdout
    text, _, everything = (tmp_path / REPORT).read_text().partition(JSON_MARK)
    assert "a rehearsal on the CPU" in text and LAYER in text and "rank 1 is silent" in text
    found = json.loads(everything)
    assert [record["name"] for record in found["records"]] == [LAYER, other]
    assert "measured/step" in found["missing"] and found["machine"]["packages"]["torch"]


def test_time_that_is_up_is_said_and_another_machine_is_refused(tmp_path, monkeypatch, capsys):
    from tests.gpu import __main__ as program

    arguments = ["--rehearse", "--results", str(tmp_path), "--only", LAYER, "measured/wire"]
    monkeypatch.setattr(program, "LEAST_MINUTES", 0)
    assert program.main([*arguments, "--minutes", "0.01"]) == LEFT
    assert capsys.readouterr().out.endswith("0 of 2 cases done; run it again\n")
    machine = json.loads((tmp_path / "machine.json").read_text())
    (tmp_path / "machine.json").write_text(json.dumps(machine | {"driver": "1.0"}))
    assert program.main(arguments) == UNUSABLE
    assert "holds results of another machine or installation (other driver)" in capsys.readouterr().err


def test_help_needs_no_installation(tmp_path):
    """And the list of cases may be cut short, as by `head`."""
    for name in ("tests/gpu.sh", "tests/__init__.py", "tests/gpu/__main__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    command = ["bash", str(tmp_path / "tests/gpu.sh"), "--only", LAYER, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--minutes" in done.stdout and not done.stderr
    listing = f"set -o pipefail; {sys.executable} -m tests.gpu --rehearse --list | true"
    done = subprocess.run(["bash", "-c", listing], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and not done.stderr


def test_without_a_gpu_one_line_says_so():
    done = gpu_tests("--only", LAYER)
    assert done.returncode == UNUSABLE and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: no GPU that torch can use (") and "--rehearse" in done.stderr


@pytest.mark.parametrize(
    ("fault", "state", "says"),
    [
        ("raise", "failed", "rank 1: Error: planted"),
        ("die", "crashed", "the last words"),
        ("hang", "hung", "[1]"),
    ],
)
def test_failed_rank_is_reported_and_the_next_case_runs(tmp_path, fault, state, says):
    pool = Pool(2, on_gpus=False, folder=tmp_path, module="tests.gpu.planted")
    try:
        with pytest.raises(CaseFailure, match=re.escape(says)) as raised:
            pool.run({"fault": fault}, seconds=1 if fault == "hang" else 30)
        assert raised.value.state == state and not pool.alive
        assert pool.run({"fault": None}, seconds=30) == {"figures": []}
    finally:
        pool.close()


@pytest.mark.parametrize("ends", ["; kill -9 $$", "; sleep 60"])
def test_ranks_that_outlive_their_launcher_are_ended(tmp_path, monkeypatch, ends):
    """They have sessions of their own, and once it is killed no parent. Some keep its output open."""
    monkeypatch.setattr(programs, "TERMINATION_SECONDS", 0.5)
    pids, began = tmp_path / "pids", time.monotonic()
    started = "".join(f"setsid sh -c 'echo $$ >> {pids}; exec sleep 60{to}' & " for to in ("", " >&- 2>&-"))
    with pytest.raises(CaseFailure) as raised:
        programs.Programs(tmp_path, rehearse=True, patience=1.0)._call(
            ["sh", "-c", f"{started} while ! grep -c . {pids} | grep -q 2; do sleep 0.05; done{ends}"]
        )
    assert raised.value.state == "hung" and time.monotonic() - began < 4
    alive = [one.pid for one in psutil.process_iter() if one.status() != psutil.STATUS_ZOMBIE]
    assert not set(alive) & set(map(int, pids.read_text().split()))


def test_a_program_that_fails_or_hangs_says_nothing_of_the_machine(monkeypatch):
    """As nvidia-smi does without its driver, or on a GPU that is lost."""
    monkeypatch.setattr(machine, "SECONDS", 0.1)
    assert machine._says("sh", "-c", "echo NVIDIA-SMI has failed; exit 9") is None
    assert machine._says("sleep", "3") is None and machine._says("no-such-program") is None
    monkeypatch.setattr(machine, "SECONDS", 10)
    assert machine._says("echo", "590.48") == "590.48"


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_the_cases_cover_what_there_is(gpus):
    """Every stage, precision, tensor-parallel size and method on all GPUs, in settings that are accepted;
    and each can start in a piece.
    """
    everything = cases(gpus, memory_gib=80, rehearse=False)
    page = (ROOT / "docs" / "guides" / "first_gpu_run.md").read_text()
    assert f"\n| {gpus} | {len(everything)} |" in page
    names = [case.name for case in everything]
    assert len(set(names)) == len(names)
    for tensor in [n for n in (1, 2, 4, 8) if n <= gpus]:
        settings = [case.settings for case in everything if case.kind == "losses"]
        here = [s for s in settings if s["layout"]["tensor_parallel"] == tensor]
        assert {s["layout"]["world_size"] for s in here} == {gpus}
        assert {(s["method"], s["changes"]["zero_stage"]) for s in here} >= {
            (method, stage) for method in METHODS for stage in range(4)
        }
    trainings = {
        json.dumps([c.settings["layout"], c.settings["changes"]]) for c in everything if c.kind == "losses"
    }
    for layout, changes in map(json.loads, sorted(trainings)):
        config = configuration(METHODS[-1], Layout(**layout), **changes)
        check(config, world_size=gpus)
    longest = max(case.limit_seconds for case in everything if case.ranks)
    assert {case.settings["overlap"] for case in everything if case.kind == "rank checks"} == {True, False}
    assert longest + CHECK_SECONDS + 2 * START_SECONDS < 60 * LEAST_MINUTES
    assert {case.name for case in chosen(everything, ["programs/gpt2", "*/wire"])} == {
        *(name for name in names if name.startswith("programs/gpt2/")),
        "measured/wire",
    }


def test_the_last_lines_are_those_of_the_program_that_failed():
    said = "\n".join([*map(str, range(20)), "error: no such thing"])
    launcher = "E1129 14:53 1 torch/distributed/elastic/multiprocessing/api.py:1002] failed\n" + "more\n" * 30
    assert last_lines(f"{said}\n{launcher}").splitlines() == [*map(str, range(9, 20)), "error: no such thing"]
    assert last_lines(launcher).splitlines() == ["more"] * 12


def test_figures_are_judged_by_their_limits():
    assert Figure("x", 1.0, 1.0).passed and not Figure("x", 1.1, 1.0).passed
    assert not Figure("x", float("nan"), 1.0).passed
    assert Figure("x", 9.0).passed and Figure("x", 9.0, 1.0, judged=False).passed
    row = {
        "case": "MLP phase-2",
        "quantity": "seconds",
        "measured": 2.0,
        "limit": None,
        "ratio_vs_dense": 0.5,
    }
    bound = bound_of("layer", row)
    assert bound.limit == 1.0 and value_of(bound, row) == 0.5
    assert bound_of("layer", row | {"case": "MLP dense"}) is None


def test_the_commands_of_the_page_are_accepted():
    page = (ROOT / "docs" / "guides" / "first_gpu_run.md").read_text()
    lines = re.findall(r"^(?:\S+=\S+ )*bash tests/gpu\.sh *([^#\n]*)", page, re.MULTILINE)
    assert len(lines) > 4
    for line in lines:
        _parse(line.split())
