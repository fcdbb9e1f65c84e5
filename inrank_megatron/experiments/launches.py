"""Runs of the launcher as processes of their own, several at a time, none of which is run twice.

A run that has ended is left alone, and one that was stopped goes on, so a study can be given again at any
time.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from inrank_megatron.errors import UserError
from inrank_megatron.experiments.results import has_ended, log_of

LAUNCHER = "inrank_megatron_launch.pretrain_gpt2"
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Launch:
    """A run in ``folder``, with all of its other flags."""

    folder: Path
    flags: tuple[str, ...]


def claim(path: Path, now: Mapping[str, Any]) -> None:
    """Write what the runs of a folder have in common into the file ``path`` of it, or compare with it.

    Raises:
        UserError: the folder holds runs of other settings, or cannot be written.
    """
    now = json.loads(json.dumps(now))  # as it is read back
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(now, indent=1), encoding="utf-8")
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError("but a list or a value")
    except OSError as error:
        raise UserError(f"--output {path.parent}: {error.strerror}; give another folder") from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON object ({error}); give another --output") from error
    if before != now:
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        old, new = ({name: found.get(name) for name in names} for found in (before, now))
        raise UserError(f"{path.parent} holds runs of {old}, not of {new}: give another --output")


class Runs:
    """The processes of the runs that are going on. A SIGTERM to this process stops them as well, so that they
    save and none holds its folder when the same command is given again.
    """

    def __init__(self) -> None:
        self._processes: set[subprocess.Popen] = set()
        self.stopped = False

    def run(self, command: Sequence[str], **options: Any) -> int:
        """The exit status of the command."""
        process = subprocess.Popen(command, **options)
        self._processes.add(process)
        if self.stopped:  # while it was started
            process.terminate()
        status = process.wait()
        self._processes.discard(process)
        return status

    def stop(self, *_: object) -> None:
        """What a signal calls."""
        self.stopped = True
        for process in tuple(self._processes):
            process.terminate()


def run_all(launches: Sequence[Launch], *, jobs: int, notify: Notify) -> None:
    """Run those that have not ended, ``jobs`` at a time, each with one GPU where there are any.

    Raises:
        UserError: a run failed for another reason than its learning rate.
        SystemExit: a SIGTERM stopped this process and the runs.
    """
    # Imported here: torch takes seconds, and to read what is there needs none of it.
    from inrank_megatron.distributed.platform import device_count

    visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), device_count()
    workers: SimpleQueue[int] = SimpleQueue()
    for worker in range(jobs):
        workers.put(worker)

    def run_one(launch: Launch) -> None:
        worker = workers.get()
        try:
            gpu = gpu_of(worker, visible=visible, count=count)
            _run(launch, runs, notify, env={"OMP_NUM_THREADS": "1"} | gpu)
        finally:
            workers.put(worker)

    runs = Runs()
    before = signal.signal(signal.SIGTERM, runs.stop)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run_one, launches))
    finally:
        signal.signal(signal.SIGTERM, before)
    if runs.stopped:
        notify("stopped by SIGTERM, and the runs with it: the same command continues")
        sys.exit(128 + signal.SIGTERM)


def gpu_of(worker: int, *, visible: str | None, count: int) -> dict[str, str]:
    """The environment in which the runs of a worker see one GPU, of ``count`` that are ``visible``."""
    if count == 0:
        return {}
    names = visible.split(",") if visible is not None else [str(index) for index in range(count)]
    return {"CUDA_VISIBLE_DEVICES": names[worker % count].strip()}


def _run(launch: Launch, runs: Runs, notify: Notify, *, env: Mapping[str, str]) -> None:
    folder = launch.folder
    if has_ended(folder) or runs.stopped:
        return
    notify(f"{folder} ...")
    folder.parent.mkdir(parents=True, exist_ok=True)
    last = ["--save", str(folder), "--resume", "auto"]
    with log_of(folder).open("w", encoding="utf-8") as log:
        status = runs.run(
            [sys.executable, "-m", LAUNCHER, *launch.flags, *last],
            stdout=log, stderr=subprocess.STDOUT, env=os.environ | env,
        )  # fmt: skip
        log.write(f"exit status {status}\n")
    if runs.stopped:
        return
    if not has_ended(folder):
        raise UserError(
            f"{folder}: the run ended with status {status}, not for its learning rate: "
            f"{_last_error(log_of(folder))}; its output is in {log_of(folder)}; correct it, and give the "
            "command again, which continues"
        )
    if status:
        notify(f"the rate is too high: {log_of(folder)}")


def _last_error(log: Path) -> str:
    """What the launcher said last of a mistake; else the line before the exit status."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return errors[-1] if errors else (lines[-2] if len(lines) > 1 else "it printed nothing").strip()
