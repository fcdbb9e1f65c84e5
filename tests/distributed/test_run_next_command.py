"""What a finished run prints to go on works as printed, and does to the learning rate what it says."""

import re
import shlex

import pytest

from tests.distributed.launches import TINY, data_flags, launch, records


def test_the_printed_command_goes_on_at_the_printed_rate(tmp_path):
    """In a folder with a space."""
    save = tmp_path / "my run"
    first = launch([*TINY, "--train-iters", "4", "--save", str(save), *data_flags(tmp_path)])
    assert first.process.returncode == 0, first.stderr
    [words] = re.findall(r"^  go on +python \S+ (.*)$", first.stdout, flags=re.MULTILINE)
    rate, step, last = re.search(r"back to (\S+) at step (\d+), then down to (\S+)\)", first.stdout).groups()
    again = launch(shlex.split(words))
    assert again.process.returncode == 0, again.stderr
    rates = {record["step"]: record["lr"] for record in records(save, "train")}
    assert (int(step), max(rates)) == (5, 8)
    assert (rates[5], rates[8]) == (pytest.approx(float(rate), rel=0.01), float(last))
    notes = [record["text"] for record in records(save, "note")]
    assert any(f"{rate} now; --lr-decay-iters 4 keeps the old decay" in note for note in notes), notes
