"""Real runs of a small model for an experiment: each is a process of the launcher with a run folder."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from inrank_megatron.errors import UserError
from inrank_megatron.experiments.launches import LAUNCHER
from inrank_megatron.reporting.run import Run, read_run

SETTINGS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --seq-length 64 --micro-batch-size 16 "
    "--vocab-size 1024 --init-method-std 0.05 --optimizer adamw --lr 4e-3 --lr-warmup-iters 20 --seed 1"
)
"""Seconds of one core for 100 steps, on the English that every Python carries. With initial weights of 0.02 a
model this narrow would lose nothing with W0."""


@dataclass(frozen=True)
class SmallRuns:
    """Runs of ``SETTINGS`` in one folder, on one thread each; they share their token files."""

    folder: Path
    notify: Callable[[str], None]

    def train(self, name: str, flags: str, *, steps: int) -> Run:
        """Train for ``steps``; ``flags`` come last, so they replace those of ``SETTINGS``.

        Raises:
            UserError: the run failed; it has the end of the run's output.
        """
        folder = self.folder / name
        given = f"{SETTINGS} --train-iters {steps} --eval-interval {steps} --save-interval {steps} {flags}"
        own = ["--log-interval", "10", "--data-cache-path", str(self.folder / "tokens")]
        ended = subprocess.run(
            [sys.executable, "-m", LAUNCHER, *given.split(), *own, "--save", str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if ended.returncode:
            last = ended.stdout.splitlines()[-1:]
            raise UserError(f"{name}: the run failed with status {ended.returncode}: {' '.join(last)}")
        run = read_run(folder)
        self.notify(f"{name}: test perplexity {perplexity_of(run):.1f}")
        return run


def perplexity_of(run: Run) -> float:
    """That after the last step, over the whole test text."""
    found = run.last_evaluation("test")
    assert found is not None, "a run that ends well has evaluated"
    return found["perplexity"]
