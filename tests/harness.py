"""Real ranks for tests: processes joined by gloo, and launches of the main program.

Importing Megatron-Core and DeepSpeed takes seconds, so the ranks of one world size stay alive for the
whole session and serve one function after another; a failure ends them, and the next call starts new ones.
"""

import faulthandler
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from tests.forked import server
from tests.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN = ROOT / "launch" / "pretrain_gpt2.py"
_START_SECONDS = 120
# A function that ends well leaves some fifteen.
_MOST_THREADS = 60


class RankError(AssertionError):
    """A rank raised, died or did not answer in time; the message holds its traceback."""


def run_ranks(function: Callable, world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on every rank and return the results in rank order.

    ``torch.distributed`` is initialised with gloo, the patches are applied, the seed is 0, and Megatron's
    groups of an earlier call are gone. ``function`` is a top-level function of an importable module; its
    arguments and results must survive a pipe (detach tensors that carry a gradient).

    Raises:
        RankError: with the traceback of the rank that failed first. The other ranks are ended.
    """
    if world_size not in _POOLS:
        _POOLS[world_size] = RankPool(world_size)
    return _POOLS[world_size].run(function, *args, timeout=timeout)


def close_pools() -> None:
    """End the ranks of all world sizes."""
    for pool in _POOLS.values():
        pool.close()
    _POOLS.clear()


class RankPool:
    """``world_size`` processes that serve functions until :meth:`close` or a failure."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._processes: list[multiprocessing.Process] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable, *args: Any, timeout: float = 120) -> list[Any]:
        """As :func:`run_ranks`."""
        if not self._processes:
            self._start()
        try:
            for pipe in self._pipes:
                pipe.send((function, args, timeout))
            return self._collect(timeout, function.__name__)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = server()
        with tempfile.NamedTemporaryFile(prefix="ranks-", delete=False) as file:
            store = file.name
        os.unlink(store)  # torch makes the file; only the unused name is wanted
        for rank in range(self._world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._world_size, store, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        try:
            self._collect(_START_SECONDS, "the start of the ranks")
        except BaseException:
            self.close()
            raise

    def _collect(self, timeout: float, what: str) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self._world_size:
            waiting = {p: r for r, p in enumerate(self._pipes) if r not in results}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(f"{what}: ranks {sorted(waiting.values())} gave no answer in {timeout:g} s")
            for pipe in ready:
                results[waiting[pipe]] = self._receive(pipe, waiting[pipe], what)
        return [results[rank] for rank in range(self._world_size)]

    def _receive(self, pipe: Connection, rank: int, what: str) -> Any:
        try:
            succeeded, answer = pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            process = self._processes[rank]
            process.join(timeout=5)
            raise RankError(f"{what}: rank {rank} died, exit code {process.exitcode}") from error
        if not succeeded:
            raise RankError(f"{what}: rank {rank} of {self._world_size} raised\n{answer}")
        return answer


def run_script(
    args: Sequence[str],
    *,
    num_procs: int = 2,
    launcher: str = "torchrun",
    script: Path = PRETRAIN,
    timeout: float = 240,
    env: dict[str, str] | None = None,
    cwd: Path = ROOT,
) -> tuple[int, str, str]:
    """Launch ``script`` (the main program) and return its exit status, stdout and stderr.

    ``env`` is added to this process's environment. At the time limit every process of the launch is
    killed and ``subprocess.TimeoutExpired`` is raised.
    """
    process = start_script(args, num_procs=num_procs, launcher=launcher, script=script, env=env, cwd=cwd)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, stdout, stderr


def start_script(
    args: Sequence[str],
    *,
    num_procs: int = 2,
    launcher: str = "torchrun",
    script: Path = PRETRAIN,
    env: dict[str, str] | None = None,
    cwd: Path = ROOT,
) -> subprocess.Popen:
    """Start what :func:`run_script` runs, in a process group of its own whose id is the ``pid``.

    For tests that send signals. The caller ends it: ``os.killpg(process.pid, signal.SIGKILL)``.
    """
    return subprocess.Popen(
        [*_launch_command(launcher, num_procs), str(script), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        start_new_session=True,
    )


def _launch_command(launcher: str, num_procs: int) -> list[str]:
    programs = Path(sys.executable).parent
    if launcher == "torchrun":
        processes = ["--nproc_per_node", str(num_procs)]
    elif launcher == "deepspeed":
        processes = ["--num_gpus", str(num_procs)]
    else:
        raise ValueError(f"launcher {launcher!r} must be torchrun or deepspeed")
    return [str(programs / launcher), *processes, "--master_port", str(free_port())]


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    """The life of one rank: start, then answer calls until the parent closes the pipe."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"})
    _answer(pipe, _join, rank, world_size, store)
    while True:
        try:
            function, args, timeout = pipe.recv()
        except EOFError:
            return
        except Exception:  # the function's module does not import in this process: the caller must see why
            pipe.send((False, traceback.format_exc()))
            continue
        faulthandler.dump_traceback_later(timeout)
        _answer(pipe, _call, function, rank, world_size, args)
        faulthandler.cancel_dump_traceback_later()


def _join(rank: int, world_size: int, store: str) -> None:
    from inrank_megatron.distributed.platform import prepare_process

    prepare_process()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(minutes=5)
    )
    # So that a collection after every call looks at what the calls made, not at the libraries.
    gc.collect()
    gc.freeze()


def _call(function: Callable, rank: int, world_size: int, args: tuple) -> Any:
    result = call(function, rank, world_size, args)
    threads = psutil.Process().num_threads()
    if threads > _MOST_THREADS:
        raise RuntimeError(f"{function.__name__} left {threads} threads behind: stop its engine at its end")
    return result


def call(function: Callable, rank: int, world_size: int, args: tuple) -> Any:
    """``function(rank, world_size, *args)`` on this rank, and the end of all that it has begun."""
    from megatron.core import parallel_state

    torch.manual_seed(0)
    groups = dist.distributed_c10d._world.pg_map
    known = set(groups)
    try:
        result = function(rank, world_size, *args)
    finally:
        while at_end:
            at_end.pop()()
        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
        # Megatron forgets most of its groups without ending them, and each holds threads that poll: after
        # some dozens of calls they would slow the machine to a halt.
        for group in [g for g in groups if g not in known]:
            dist.destroy_process_group(group)
        # An engine is full of cycles, and as long as it lives it holds its ended groups.
        gc.collect()
    return result


def _answer(pipe: Connection, function: Callable, *args: Any) -> None:
    try:
        pipe.send((True, function(*args)))
    except Exception:
        pipe.send((False, traceback.format_exc()))


at_end: list[Callable[[], None]] = []
"""On a rank: what the function of the present call leaves to be done at its end."""
_POOLS: dict[int, RankPool] = {}
