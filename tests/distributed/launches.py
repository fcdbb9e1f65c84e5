"""Launches of the main program that a test may interrupt, and what they leave in their run folder."""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.forked import Forked
from tests.harness import PRETRAIN, ROOT, free_port, start_script

# Both phases of InRank-Efficient in a model that takes milliseconds per step.
TINY = [
    *("--inrank", "--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"),
    *("--seq-length", "64", "--vocab-size", "512", "--micro-batch-size", "2", "--global-batch-size", "4"),
    *("--rank-check-interval", "4", "--lr-warmup-iters", "2"),
]
# Under which rank checks decide the final ranks, and no rate is refused.
ADAMW = ["--matrix-optimizer", "adamw", "--factor-optimizer", "adamw", "--lr", "2e-3"]
MARK = (
    "INRANK_MEGATRON_TEST_LAUNCH"  # in the environment of all processes of a launch, whoever their parent is
)
PATIENCE = 240  # seconds for anything, on a machine that does other work too


class Launch:
    """A running launch; use it as a context manager, so that nothing of it outlives the test.

    Args:
        launcher: ``deepspeed``, ``torchrun``, ``python`` for one process without a launcher, or ``forked``
            for ranks that have imported everything when they start.
        num_procs: ranks.
        script: the main program, or a test's program around it.
        env: added to this process's environment.
    """

    def __init__(
        self,
        args: list[str],
        *,
        launcher: str = "forked",
        num_procs: int = 1,
        script: Path = PRETRAIN,
        env: dict[str, str] | None = None,
    ):
        self._mark, self._script = uuid.uuid4().hex, script
        self._forked: list[psutil.Process] = []
        env = {**(env or {}), MARK: self._mark}
        if launcher == "forked":
            self.process = Forked(
                script, args, num_procs=num_procs, env={**os.environ, **env}, cwd=ROOT, port=free_port()
            )
            self._forked = self.process.ranks
        elif launcher == "python":
            command, pipe = [sys.executable, str(script), *args], subprocess.PIPE
            self.process = subprocess.Popen(
                command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env={**os.environ, **env}
            )
        else:
            self.process = start_script(args, num_procs=num_procs, launcher=launcher, script=script, env=env)
        self.stdout = self.stderr = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *exception) -> None:
        for process in self.processes():
            process.kill()
        self._reader.join(timeout=30)

    def _read(self) -> None:
        self.stdout, self.stderr = self.process.communicate()

    def processes(self) -> list[psutil.Process]:
        """Launchers and ranks that run, also those whose parent has died."""
        return [process for process in psutil.process_iter() if self._is_own(process)]

    def ranks(self) -> list[psutil.Process]:
        """The ranks that run, in order."""
        if self._forked:
            return [process for process in self._forked if self._is_own(process)]
        found = [p for p in self.processes() if str(self._script) in p.cmdline()[1:3]]
        return sorted(found, key=lambda process: int(process.environ().get("RANK", 0)))

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait; the launch must not end before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"ended before {what}\n{self.wait_for_output()}"
            assert time.monotonic() < deadline, f"no {what} in {PATIENCE} s"
            time.sleep(0.02)

    def wait(self) -> int:
        """Wait for the launch and everything in it to end; the exit status of the command."""
        status = self.process.wait(timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while self.processes():
            assert time.monotonic() < deadline, f"orphans: {self.processes()}"
            time.sleep(0.05)
        self._reader.join(timeout=30)
        return status

    def wait_for_output(self) -> str:
        self._reader.join(timeout=30)
        return self.stdout + self.stderr

    def _is_own(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            if self._forked:  # whose environment, as the system shows it, is that of the server
                return os.getsid(process.pid) in {rank.pid for rank in self._forked}
            return process.environ().get(MARK) == self._mark
        except (psutil.Error, ProcessLookupError):
            return False


def launch(args: list[str], **options) -> Launch:
    """A launch that has ended by itself, successfully or not."""
    with Launch(args, **options) as started:
        started.wait()
        return started


def data_flags(folder: Path) -> list[str]:
    """A corpus of some 40,000 tokens, few of them to evaluate on, and its cache."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_bytes(Path(argparse.__file__).read_bytes())
    split = ["--data-path", str(folder / "corpus.txt"), "--split", "94,3,3"]
    return [*split, "--data-cache-path", str(folder / "cache")]


def records(folder: Path, kind: str) -> list[dict]:
    """The records of one kind in ``metrics.jsonl``, or all of ``ranks.jsonl`` for the kind ``ranks``."""
    path = folder / ("ranks.jsonl" if kind == "ranks" else "metrics.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return found if kind == "ranks" else [record for record in found if record["kind"] == kind]


def last_step(folder: Path) -> int:
    """The last step on record, 0 before the first."""
    return max((record["step"] for record in records(folder, "train")), default=0)


def course(folder: Path) -> dict[str, list]:
    """What of a run must not depend on its interruptions."""
    train = ("step", "loss", "grad_norm", "lr", "tokens", "phase", "mean_rank")
    return {
        "train": [tuple(record[name] for name in train) for record in records(folder, "train")],
        "eval": [(r["step"], r["split"], r["loss"], r["tokens"]) for r in records(folder, "eval")],
        "ranks": records(folder, "ranks"),
        "parameters": json.loads((folder / "summary.json").read_text())["parameters"],
    }
