"""The progress display, in a real process: through a pipe and in a pseudo terminal."""

import contextlib
import os
import pty
import re
import subprocess
import sys

import pytest

from inrank_megatron.reporting.console import duration

PROGRAM = """
import sys
from inrank_megatron.reporting.console import Console
record = dict(loss=5.123, perplexity=167.9, lr=1e-3, grad_norm=0.52, tokens_per_second=9123.4,
              tflops_per_second=0.11, utilisation=None, mean_rank=7.3, phase=1)
with Console(300, start_step=23) as console:
    console.message("[bold] is printed as it is")
    console.step({**record, "step": 24})
    console.step({**record, "step": 25, "phase": 2, "utilisation": 0.314, "max_memory_allocated": 13207024435,
                  "tokens_per_second_per_device": 1140.4})
    console.step({**record, "step": 26, "phase": 0, "mean_rank": None, "grad_norm": None,
                  "loss": float("nan")})
    if "fail" in sys.argv:
        raise RuntimeError("boom")
    console.message("the end")
"""


def test_through_a_pipe_each_call_is_one_plain_line() -> None:
    # Continuous integration often sets this, and rich would then colour a pipe.
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": "40"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment
    )
    lines = run.stdout.splitlines()
    assert run.stderr == ""
    assert lines[0] == "[bold] is printed as it is"
    assert re.fullmatch(
        r"step 24/300 \| phase 1 \| loss 5\.123 \| ppl 167\.9 \| lr 1\.0e-03 \| grad norm 0\.52 \| "
        r"9,123 tokens/s \| 0\.11 TFLOP/s \| mean rank 7\.3 \| eta \d+:\d\d",
        lines[1],
    )
    assert " | phase 2 | " in lines[2] and "0.11 TFLOP/s (31% of peak)" in lines[2]
    assert "9,123 tokens/s (1,140 a GPU)" in lines[2] and "| peak 12.3 GiB |" in lines[2]
    assert " | dense | loss nan | " in lines[3]
    assert "rank" not in lines[3] and "grad norm" not in lines[3]
    assert lines[4:] == ["the end"]


def _in_terminal(*arguments: str, term: str) -> tuple[int, str]:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": term, "COLUMNS": "100", "LINES": "30"}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = bytearray()
    # Linux reports the end of a pseudo terminal as an input/output error.
    with contextlib.suppress(OSError):
        while data := os.read(ours, 65536):
            output += data
    os.close(ours)
    return process.wait(), output.decode()


@pytest.mark.parametrize("arguments", [(), ("fail",)])
def test_a_terminal_has_a_live_display_and_is_restored(arguments: tuple[str, ...]) -> None:
    code, output = _in_terminal(*arguments, term="xterm-256color")
    assert code == len(arguments)
    assert "step 25/300" in output and "mean rank 7.3" in output
    assert "\x1b[2K" in output, "the display is redrawn in place"
    assert "[bold] is printed as it is" in output
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l"), "the cursor is shown at the end"
    assert ("boom" in output) == bool(arguments)
    # Hidden only for as long as it takes to show it again: nothing to undo if the process is killed.
    hidden = output.find("\x1b[?25l")
    assert output.find("\x1b[?25h", hidden) - hidden < 80


def test_a_terminal_that_cannot_redraw_gets_plain_lines() -> None:
    code, output = _in_terminal(term="dumb")
    assert code == 0
    assert "\x1b[" not in output
    assert output.count("\r\nstep 2") == 3


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (83.4, "1:23"), (3599.7, "1:00:00"), (97262, "27:01:02")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("closed", ["pipe", "terminal"])
def test_output_whose_reader_is_gone_is_no_fault(closed):
    """As of a plan that goes through `head`, or of a run whose terminal is closed, which then did not save:
    no traceback, and no status of failure.
    """
    code = (
        "from inrank_megatron.reporting.console import unless_nobody_reads\n"
        "input()\n"
        "with unless_nobody_reads():\n    print('a line that nobody reads' * 10_000)\n"
        "with unless_nobody_reads():\n    print('another')\n"
    )
    reader, output = os.pipe() if closed == "pipe" else pty.openpty()
    pipes = {"stdin": subprocess.PIPE, "stdout": output, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    os.close(output)
    os.close(reader)
    _, errors = process.communicate("go on\n", timeout=60)
    assert (errors, process.returncode) == ("", 0)
