"""What a finished run prints to go on works as printed, and does to the learning rate what it says."""

import re
import shlex

import pytest

from tests.distributed.launches import TINY, data_flags, launch, records


def test_printed_command_resumes_at_the_printed_learning_rate(tmp_path):
    """In a folder with a space, of a run for which a default has given way."""
    save, tiny = tmp_path / "my run", TINY[: TINY.index("--lr-warmup-iters")]
    first = launch([*tiny, "--train-iters", "4", "--save", str(save), *data_flags(tmp_path)])
    assert first.process.returncode == 0, first.stderr
    adapted = "lr_warmup_iters 20 from configs/quickstart.yaml gives way to 0: "
    assert first.stdout.count(adapted) == 1
    [words] = re.findall(r"^  go on +python \S+ (.*)$", first.stdout, flags=re.MULTILINE)
    rate, step, last = re.search(r"back to (\S+) at step (\d+), then down to (\S+)\)", first.stdout).groups()
    again = launch(shlex.split(words))
    assert again.process.returncode == 0, again.stderr
    rates = {record["step"]: record["lr"] for record in records(save, "train")}
    assert (int(step), max(rates)) == (5, 8)
    assert (rates[5], rates[8]) == (pytest.approx(float(rate), rel=0.01), float(last))
    assert "gives way" not in again.stdout
    notes = [record["text"] for record in records(save, "note")]
    assert notes[0].startswith(adapted)
    assert any(f"{rate} now; --lr-decay-iters 4 keeps the old decay" in note for note in notes), notes
