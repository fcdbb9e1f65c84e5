"""The main program and the tools as a user starts them, on the GPUs and, for comparison, on the CPU."""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.gpu import limits
from tests.gpu.cases import Case
from tests.gpu.failures import CaseFailure, last_lines
from tests.gpu.figures import Figure
from tests.gpu.pool import HIDDEN, ROOT
from tests.ports import free_port

MODELS = {
    "gpt2": ["--inrank"],
    "llama": ["--inrank", "--model-type", "llama", "--factorised-linears", "mlp-attention"],
}
SMALL = [
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "64"),
    *("--vocab-size", "512", "--micro-batch-size", "1", "--global-batch-size", "8"),
    *("--rank-check-interval", "5", "--lr-warmup-iters", "2", "--train-iters", "60", "--switch-iters", "30"),
    *("--save-interval", "20", "--eval-interval", "30"),
]
"""Both phases in a model whose global batch any number of GPUs divides."""
SAVED = 20
FORMATS = ("hf-dense", "hf-factorised", "megatron")
PROMPT, NEW_TOKENS = "The ", "20"
TERMINATION_SECONDS = 20
MARK = "INRANK_GPU_TESTS_PROGRAM"
"""In the environment of a program, and so of all that it starts."""


class Programs:
    """Runs the cases that start programs; their files stay in ``folder`` for the next ones."""

    def __init__(self, folder: Path, *, rehearse: bool, patience: float):
        self._folder, self._rehearse, self._patience = folder, rehearse, patience
        self._deadline = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, case: Case) -> list[Figure]:
        """The figures of a case.

        Raises:
            CaseFailure: a program failed or did not end in time.
        """
        self._deadline = time.monotonic() + self._patience * case.limit_seconds
        kinds: dict[str, Callable[[dict], list[Figure]]] = {
            "hash_store": self._hash_store,
            "program": self._program,
            "deepspeed": self._deepspeed,
            "repeat": self._repeat,
            "bench": self._bench,
        }
        return kinds[case.kind](case.settings)

    # ---- kinds -----------------------------------------------------------------------------------------

    def _hash_store(self, settings: dict) -> list[Figure]:
        self._call([sys.executable, "-m", "tests.gpu.hash_store"])
        return []

    def _bench(self, settings: dict) -> list[Figure]:
        """Rows of `tools/bench.py`, with the limits of ``limits.py``."""
        what, *more = settings["arguments"]
        found = []
        for row in json.loads(self._tool("bench.py", what, *more, "--json")):
            name, dense = f"{row['case']}: {row['quantity']}", row["ratio_vs_dense"]
            bound = limits.bound_of(what, row)
            found.append(Figure(name, row["measured"], None, dense))
            if bound:
                of = {"gap": ", over what arithmetic or a target allows", "dense": ", over dense"}
                judged = settings["judge_times"] or not bound.timed
                value = limits.value_of(bound, row)
                found[-1] = Figure(name + of.get(bound.field, ""), value, bound.limit, dense, judged)
        return found

    def _deepspeed(self, settings: dict) -> list[Figure]:
        """DeepSpeed's launcher, BF16."""
        run = self._folder / "deepspeed"
        shutil.rmtree(run, ignore_errors=True)
        launcher = [_program("deepspeed"), *self._places(settings["gpus"]), "--master_port", str(free_port())]
        self._call([*launcher, "launch/pretrain_gpt2.py", *self._flags("gpt2", run), "--bf16"])
        return [Figure("last loss over the first", _losses(run)[-1] / _losses(run)[0], 1.0)]

    def _places(self, gpus: int) -> list[str]:
        """For DeepSpeed's launcher, which forgets the list of visible GPUs when it is given their number."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if self._rehearse or not visible:
            return ["--num_gpus", str(gpus)]
        names = visible.split(",")[:gpus]
        if not all(name.isdecimal() for name in names):
            raise CaseFailure("skipped", f"DeepSpeed's launcher takes GPUs by number, not {visible}")
        return ["--include", f"localhost:{','.join(names)}"]

    def _repeat(self, settings: dict) -> list[Figure]:
        """Twice the same run in the deterministic mode, the second interrupted at step 20; to the bit."""
        gpus, precision = settings["gpus"], settings["precision"]
        mode = ["--deterministic-mode", *([f"--{precision}"] if precision != "fp32" else []), *_shards(gpus)]
        once, again = (self._folder / f"repeat {precision} {name}" for name in ("once", "again"))
        for run in (once, again):
            shutil.rmtree(run, ignore_errors=True)
            self._torchrun(gpus, [*self._flags("gpt2", run), *mode])
        changed = _different(once, again)
        _cut(again)
        self._torchrun(gpus, [*self._flags("gpt2", again), *mode, "--resume", "auto"])
        return [
            Figure("losses that are not the same to the bit", changed, 0),
            Figure("losses that are not the same to the bit, resumed", _different(once, again), 0),
            Figure("tokens per second, median of the second phase", _rate(once)),
        ]

    def _program(self, settings: dict) -> list[Figure]:
        steps = {
            "train": self._train,
            "resume": self._resume,
            "resume elsewhere": self._resume_elsewhere,
            "evaluate": self._evaluate,
            "generate": self._generate,
            "convert": self._convert,
        }
        return steps[settings["what"]](settings["model"], settings["gpus"])

    def _train(self, model: str, gpus: int) -> list[Figure]:
        """Each step of a run next to the same run by one process of the CPU."""
        shutil.rmtree(self._run(model), ignore_errors=True)
        run, serial = self._trained(model, gpus), self._folder / f"{model} serial"
        if not _is_finished(serial):
            shutil.rmtree(serial, ignore_errors=True)
            self._call([sys.executable, "launch/pretrain_gpt2.py", *self._flags(model, serial)], hidden=True)
        return [
            Figure("largest relative difference of a loss", _difference(run, serial), limits.PROGRAM_LOSS),
            Figure("largest difference of a rank", _ranks_apart(run, serial), limits.RANK),
            Figure(
                "relative difference of the last validation",
                _validations_apart(run, serial),
                limits.PROGRAM_LOSS,
            ),
            Figure("tokens per second, median of the second phase", _rate(run)),
        ]

    def _resume(self, model: str, gpus: int) -> list[Figure]:
        """From step 20 on, in the first phase, next to the run that was not interrupted."""
        return self._resumed(model, gpus, f"{model} resumed", gpus, [], limits.RESUMED_LOSS)

    def _resume_elsewhere(self, model: str, gpus: int) -> list[Figure]:
        """The same on one GPU under ZeRO 3."""
        elsewhere = ["--tensor-model-parallel-size", "1", "--zero-stage", "3"]
        return self._resumed(model, gpus, f"{model} elsewhere", 1, elsewhere, limits.PROGRAM_LOSS)

    def _resumed(
        self, model: str, gpus: int, name: str, processes: int, flags: list[str], limit: float
    ) -> list[Figure]:
        run, copy = self._trained(model, gpus), self._folder / name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        _cut(copy)
        self._torchrun(processes, [*self._flags(model, copy), *_shards(gpus), *flags, "--resume", "auto"])
        return [
            Figure("largest relative difference of a loss", _difference(copy, run), limit),
            Figure("largest difference of a rank", _ranks_apart(copy, run), 0),
            Figure("losses that are not the same to the bit", _different(copy, run)),
        ]

    def _evaluate(self, model: str, gpus: int) -> list[Figure]:
        run = str(self._trained(model, gpus))
        command = [*_torchrun(gpus), "tools/evaluate.py", run, "--json"]
        here = json.loads(self._call(command))
        there = json.loads(self._tool("evaluate.py", run, "--json", hidden=True))
        difference = abs(here["perplexity"] / there["perplexity"] - 1)
        return [Figure("relative difference of the perplexity from the CPU's", difference, limits.PERPLEXITY)]

    def _generate(self, model: str, gpus: int) -> list[Figure]:
        run = str(self._trained(model, gpus))
        given = (run, "--prompt", PROMPT, "--greedy", "--max-new-tokens", NEW_TOKENS)
        here, there = (self._tool("generate.py", *given, hidden=hidden) for hidden in (False, True))
        different = sum(a != b for a, b in zip(here, there, strict=False)) + abs(len(here) - len(there))
        return [Figure("likeliest characters that differ from the CPU's", different, 0)]

    def _convert(self, model: str, gpus: int) -> list[Figure]:
        """The tool compares both models itself, and fails where they differ."""
        run, found = self._trained(model, gpus), []
        for name in FORMATS:
            target = self._folder / f"{model} {name}"
            shutil.rmtree(target, ignore_errors=True)
            said = self._tool("convert_checkpoint.py", str(run), str(target), "--format", name)
            number = re.search(r"[\d.]+(e-?\d+)?$", said.strip().splitlines()[-1])
            found.append(
                Figure(f"{name}: difference that the tool found", float(number[0]) if number else 0.0)
            )
        return found

    # ---- launches --------------------------------------------------------------------------------------

    def _trained(self, model: str, gpus: int) -> Path:
        """A finished run on all GPUs, made where it is not there yet."""
        run = self._run(model)
        if not _is_finished(run):
            shutil.rmtree(run, ignore_errors=True)
            self._torchrun(gpus, [*self._flags(model, run), *_shards(gpus)])
        return run

    def _run(self, model: str) -> Path:
        return self._folder / f"{model} run"

    def _flags(self, model: str, run: Path) -> list[str]:
        corpus = self._folder / "corpus.txt"
        if not corpus.exists():
            corpus.write_bytes(Path(argparse.__file__).read_bytes())
        data = [
            "--data-path",
            str(corpus),
            "--split",
            "94,3,3",
            "--data-cache-path",
            str(self._folder / "cache"),
        ]
        return [*MODELS[model], *SMALL, *data, "--save", str(run)]

    def _torchrun(self, processes: int, flags: list[str]) -> str:
        return self._call([*_torchrun(processes), "launch/pretrain_gpt2.py", *flags])

    def _tool(self, name: str, *arguments: str, hidden: bool = False) -> str:
        return self._call([sys.executable, f"tools/{name}", *arguments], hidden=hidden)

    def _call(self, command: list[str], *, hidden: bool = False) -> str:
        """The standard output of a program that ends well before the case's limit; ``hidden``: on the CPU."""
        env = os.environ | (HIDDEN if hidden or self._rehearse else {})
        env |= {"OMP_NUM_THREADS": "1"} if hidden or self._rehearse else {}
        env[MARK] = mark = uuid.uuid4().hex
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        name = " ".join(Path(word).name for word in command[:4])
        try:
            stdout, stderr = process.communicate(timeout=max(1.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _end(process, mark)
            said = last_lines(_left_by(process))
            raise CaseFailure("hung", f"{name} ... did not end in time: {said}") from None
        finally:
            _end(process, mark)
        if process.returncode:
            state = "crashed" if process.returncode < 0 else "failed"
            raise CaseFailure(
                state, f"{name} ..., status {process.returncode}: {last_lines(stderr or stdout)}"
            )
        return stdout


def _end(process: subprocess.Popen, mark: str) -> None:
    """End a program and all that it started, also where it has ended before: ranks have sessions of their own
    and outlive a launcher that is killed.
    """
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TERMINATION_SECONDS)
    deadline = time.monotonic() + TERMINATION_SECONDS
    while left := [one for one in psutil.process_iter() if _is_of(one, mark)]:
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        if time.monotonic() > deadline:  # a driver that hangs holds them
            return
        time.sleep(0.05)


def _left_by(process: subprocess.Popen) -> str:
    """What a program printed that has been ended; nothing where a process that cannot be ended keeps its
    output open.
    """
    try:
        return "".join(process.communicate(timeout=TERMINATION_SECONDS))
    except subprocess.TimeoutExpired:
        return ""


def _is_of(process: psutil.Process, mark: str) -> bool:
    """Whether it runs, and its environment holds the mark."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
    except psutil.Error:  # another user's, or it has just ended
        return False


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _torchrun(processes: int) -> list[str]:
    return [_program("torchrun"), "--nproc_per_node", str(processes), "--master_port", str(free_port())]


def _shards(gpus: int) -> list[str]:
    return ["--tensor-model-parallel-size", str(min(gpus, 2))]


# ---- what runs have left ----------------------------------------------------------------------------------


def _is_finished(run: Path) -> bool:
    summary = run / "summary.json"
    return summary.exists() and json.loads(summary.read_text())["finished"]


def _cut(run: Path) -> None:
    """Leave what a run had saved by step 20."""
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > SAVED:
            shutil.rmtree(checkpoint)


def _records(run: Path, file: str, kind: str | None = None) -> list[dict]:
    found = [json.loads(line) for line in (run / file).read_text().splitlines()]
    return [record for record in found if kind is None or record["kind"] == kind]


def _losses(run: Path) -> list[float]:
    return [record["loss"] for record in _records(run, "metrics.jsonl", "train")]


def _difference(run: Path, other: Path) -> float:
    """The largest relative difference of a step's loss."""
    return max(abs(a / b - 1) for a, b in zip(_losses(run), _losses(other), strict=True))


def _different(run: Path, other: Path) -> int:
    return sum(a != b for a, b in zip(_losses(run), _losses(other), strict=True))


def _ranks_apart(run: Path, other: Path) -> int:
    """The largest difference of a rank on record."""
    one, two = (
        {(r["step"], r["layer"], r["event"]): r["rank"] for r in _records(folder, "ranks.jsonl")}
        for folder in (run, other)
    )
    return max(abs(one.get(key, 0) - two.get(key, 0)) for key in one.keys() | two.keys())


def _validations_apart(run: Path, other: Path) -> float:
    one, two = (_records(folder, "metrics.jsonl", "eval")[-1]["loss"] for folder in (run, other))
    return abs(one / two - 1)


def _rate(run: Path) -> float:
    rates = [r["tokens_per_second"] for r in _records(run, "metrics.jsonl", "train") if r["phase"] == 2]
    return sorted(rates)[len(rates) // 2]
