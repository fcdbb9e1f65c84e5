"""Programs as forks of a process that has already imported what they import.

They are processes like any other, with a session, an environment and a standard output each of their own;
what they lack is the start of an interpreter, and a launcher above them.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import psutil

MAIN = "__main__"


def server() -> ForkServerContext:
    """The context in which ``Process`` makes forks; the first one starts the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


class Forked:
    """``num_procs`` ranks of a script, with the part of :class:`subprocess.Popen` that tests use.

    Args:
        script: a Python program.
        env: the whole environment; ``RANK`` and its like come on top if there are several ranks.
        port: where rank 0 listens.
    """

    def __init__(
        self, script: Path, args: Sequence[str], *, num_procs: int, env: dict[str, str], cwd: Path, port: int
    ) -> None:
        self._output = tempfile.TemporaryDirectory(prefix="forked-")
        names = [str(Path(self._output.name, name)) for name in ("stdout", "stderr")]
        self._started = []
        self._polling = threading.Lock()  # of two threads that poll a process, one would read no status
        for rank in range(num_procs):
            own = _rank_variables(rank, num_procs, port) if num_procs > 1 else {}
            given = (str(script), list(args), env | own, str(cwd), names)
            process = server().Process(target=_run, args=given, daemon=False)
            process.start()
            self._started.append(process)
        self.ranks = [psutil.Process(process.pid) for process in self._started]

    @property
    def returncode(self) -> int | None:
        """The first status that is not 0; None as long as a rank runs."""
        with self._polling:
            codes = [process.exitcode for process in self._started]
        return None if None in codes else next(filter(None, codes), 0)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises TimeoutError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for process in self._started:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not connection.wait([process.sentinel], left):
                raise TimeoutError(f"a rank still runs after {timeout:g} s")
        return self.returncode

    def terminate(self) -> None:
        """SIGTERM to every rank that runs."""
        for process in self._started:
            process.terminate()

    def kill(self) -> None:
        """SIGKILL to every rank that runs."""
        for process in self._started:
            process.kill()

    def communicate(self) -> tuple[str, str]:
        """Wait for the ranks to end; what they wrote to stdout and stderr."""
        self.wait()
        return tuple(Path(self._output.name, name).read_text() for name in ("stdout", "stderr"))


def run_forked(script: Path, *args: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a program as one fork, in the present folder and environment, to its end."""
    words = [str(word) for word in args]
    forked = Forked(script, words, num_procs=1, env=dict(os.environ), cwd=Path.cwd(), port=0)
    try:
        forked.wait(timeout)
    finally:
        forked.kill()
    return subprocess.CompletedProcess([str(script), *words], forked.returncode, *forked.communicate())


def _rank_variables(rank: int, num_procs: int, port: int) -> dict[str, str]:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_procs, "LOCAL_WORLD_SIZE": num_procs}
    return {name: str(value) for name, value in ranks.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _run(script: str, args: list[str], env: dict[str, str], cwd: str, output: list[str]) -> None:
    os.setsid()  # a signal to a test's group must not reach it, as with a launcher that starts a session
    for name, descriptor in zip(output, (1, 2), strict=True):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [script, *args]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name=MAIN)
