"""Ranks that live through many cases, each a program of its own that sees its GPU, or on the CPU none.

``tests/harness.py`` forks its ranks, which CUDA does not bear. Here each is started again, reads requests,
one on each line, and answers with lines. After a failure all are ended, and the next request starts new ones.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.gpu.failures import CaseFailure, last_lines
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120
GRACE_SECONDS = 2.0
"""A rank that has failed is waited for so long after another has died: its reason says more."""
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
"""What makes a process run on the CPU."""


class Pool:
    """``ranks`` processes of ``tests.gpu.worker``.

    Args:
        on_gpus: whether each sees the machine's GPUs, and takes that of its number.
        folder: for what they print.
        patience: how many times ``START_SECONDS`` their start may take.
        module: the program of a rank.
    """

    def __init__(
        self,
        ranks: int,
        *,
        on_gpus: bool,
        folder: Path,
        patience: float = 1.0,
        module: str = "tests.gpu.worker",
    ):
        self.ranks, self._on_gpus, self._folder = ranks, on_gpus, folder
        self._start_seconds, self._module = patience * START_SECONDS, module
        self._processes: list[subprocess.Popen] = []

    @property
    def alive(self) -> bool:
        return bool(self._processes)

    def run(self, request: dict, *, seconds: float) -> dict:
        """The answer of rank 0 to ``request``, a JSON object.

        Raises:
            CaseFailure: a rank raised, died, or gave no answer in time.
        """
        if not self._processes:
            self._start()
        try:
            line = json.dumps(request) + "\n"
            for process in self._processes:
                with contextlib.suppress(BrokenPipeError):  # its answer will be missing
                    process.stdin.write(line.encode())
                    process.stdin.flush()
            return self._collect(seconds)[0]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes and what they have started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdin.close()
            process.stdout.close()
        self._processes = []

    def _start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        common = os.environ | ({} if self._on_gpus else HIDDEN)
        port = free_port()
        for rank in range(self.ranks):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": self.ranks,
                "LOCAL_WORLD_SIZE": self.ranks,
            }
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            with self._log(rank).open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", self._module],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=common | {name: str(value) for name, value in place.items()},
                    cwd=ROOT,
                    start_new_session=True,
                )
            self._processes.append(process)
        try:
            self._collect(self._start_seconds)
        except BaseException:
            self.close()
            raise

    def _collect(self, seconds: float) -> list[dict]:
        """A line of each rank."""
        lines: dict[int, bytes] = dict.fromkeys(range(self.ranks), b"")
        answers: dict[int, dict] = {}
        died: list[int] = []
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self._processes):
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while len(answers) < self.ranks:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    break
                for key, _ in ready:
                    received = os.read(key.fd, 1 << 20)
                    lines[key.data] += received
                    if not received:
                        died.append(key.data)
                        selector.unregister(key.fileobj)
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                    elif lines[key.data].endswith(b"\n"):
                        answers[key.data] = json.loads(lines[key.data])
                        if "error" in answers[key.data]:
                            raise CaseFailure("failed", f"rank {key.data}: {answers[key.data]['error']}")
                if len(died) + len(answers) == self.ranks and died:
                    break
        if died:
            rank = died[0]
            status = self._processes[rank].wait()
            raise CaseFailure("crashed", f"rank {rank} died, status {status}: {last_lines(self._log(rank))}")
        if len(answers) < self.ranks:
            silent = sorted(set(range(self.ranks)) - answers.keys())
            said = last_lines(self._log(silent[0]))
            raise CaseFailure("hung", f"ranks {silent} gave no answer in {seconds:.0f} s: {said}")
        return [answers[rank] for rank in range(self.ranks)]

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.txt"
