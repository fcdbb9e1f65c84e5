"""All methods against one another: real runs of the launcher, each method at its best learning rate.

Every run is a process of its own with a run folder under the output folder. A run that has finished is not
run again, so the grid can be stopped, continued, and read at any time.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean

from inrank_megatron.config.cli import parse
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.errors import UserError
from inrank_megatron.experiments.arms import (
    ARMS,
    FIRST,
    Result,
    Size,
    best_rate,
    equal_flops_steps,
    flags,
    missing_rates,
    row,
)
from inrank_megatron.experiments.results import has_ended, log_of, read_curve, read_result

SETTINGS = "compare.json"
LAUNCHER = "inrank_megatron_launch.pretrain_gpt2"


@dataclass(frozen=True)
class Study:
    """A comparison: where, at which rates and seeds, and with which of the launcher's flags.

    Args:
        flags: of every run. budget: share of the dense linears' parameters for the arms that are given one.
        multiplier: learning rate of factors over that of the rest, in every arm that has factors.
        jobs: runs at a time; 0: read what is there.
    """

    output: Path
    flags: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    budget: float
    multiplier: float
    jobs: int
    notify: Callable[[str], None]

    @property
    def config(self) -> Config:
        return parse(self.flags, world_size=1).config

    def folder(self, arm: str, *, rate: float, seed: int, steps: int) -> Path:
        name = arm.replace(", ", "-").replace(" ", "_")
        return self.output / name / f"lr{rate:g}-seed{seed}-steps{steps}"


def measure(study: Study, arms: Sequence[str], *, equal_flops: bool) -> dict[str, list[dict]]:
    """Run what is missing of ``arms``; rows at equal steps, and at equal operations if asked for.

    Raises:
        UserError: the output folder holds runs of other flags, or the flags are wrong.
    """
    for arm in arms:
        if arm not in ARMS:
            raise UserError(f"--only {arm!r}: there is no such arm; the names are {list(ARMS)}")
    steps = study.config.training.train_iters
    _same_flags(study)
    sized = any("{found" in ARMS[arm] for arm in arms)
    wanted = [arm for arm in ARMS if arm in {"dense", *arms} or (arm == FIRST and sized)]
    rates: dict[str, float] = {}
    for arm in wanted:
        rate = _tune(study, arm, steps)
        if rate is not None:
            rates[arm] = rate
            _run_all(study, [(arm, rate, seed, steps) for seed in study.seeds])
    chosen = {arm: (rate, steps) for arm, rate in rates.items() if arm in arms}
    tables = {"equal steps": _rows(study, chosen, steps)}
    if equal_flops and "dense" in rates:
        longer = {arm: (rate, _longer(study, arm, rates, steps)) for arm, (rate, _) in chosen.items()}
        _run_all(study, [(arm, rate, s, n) for arm, (rate, n) in longer.items() for s in study.seeds])
        tables["equal FLOPs"] = _rows(study, longer, steps)
    return tables


def _same_flags(study: Study) -> None:
    path = study.output / SETTINGS
    now = {"flags": list(study.flags), "budget": study.budget, "multiplier": study.multiplier}
    if not path.exists():
        study.output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=1), encoding="utf-8")
    elif (before := json.loads(path.read_text(encoding="utf-8"))) != now:
        raise UserError(f"{study.output} holds runs of {before}, not of {now}: give another --output")


def _tune(study: Study, arm: str, steps: int) -> float | None:
    """Run what an arm's rate is chosen from. The rate as for `_choice`."""
    while study.jobs and (missing := missing_rates(study.rates, _tried(study, arm, steps))):
        before = len(_tried(study, arm, steps))
        _run_all(study, [(arm, rate, study.seeds[0], steps) for rate in missing])
        if len(_tried(study, arm, steps)) == before:
            break  # the arm still waits for its size
    return _choice(study, arm, steps)


def _tried(study: Study, arm: str, steps: int) -> dict[float, Result | None]:
    """What came of each rate that was tried with the first seed; None: the run failed."""
    seed = study.seeds[0]
    pattern = study.folder(arm, rate=0, seed=seed, steps=steps).name.replace("lr0-", "lr*-", 1)
    parent = study.folder(arm, rate=0, seed=seed, steps=steps).parent
    folders = {float(path.name[2:].split("-seed")[0]): path for path in parent.glob(pattern)}
    return {rate: read_result(path) for rate, path in folders.items() if has_ended(path)}


def _choice(study: Study, arm: str, steps: int) -> float | None:
    """The rate of the best validation perplexity with the first seed; None: runs miss or all failed."""
    tried = _tried(study, arm, steps)
    return None if missing_rates(study.rates, tried) else best_rate(tried)


def _longer(study: Study, arm: str, rates: dict[str, float], steps: int) -> int:
    """The arm's steps that cost what dense's do, judged by the first seed's runs."""
    seed = study.seeds[0]
    dense, own = (
        read_result(study.folder(name, rate=rates[name], seed=seed, steps=steps)) for name in ("dense", arm)
    )
    return equal_flops_steps(steps, dense=dense, arm=own)


def _rows(study: Study, chosen: dict[str, tuple[float, int]], steps: int) -> list[dict]:
    """A row for each arm of which at least one seed has finished."""
    dense, rows = _any_dense(study, steps), []
    for arm, (rate, own_steps) in chosen.items():
        folders = [study.folder(arm, rate=rate, seed=seed, steps=own_steps) for seed in study.seeds]
        results = [result for folder in folders if (result := read_result(folder))]
        if results and dense:
            rows.append(row(arm, rate, results, dense=dense, steps=own_steps))
    return rows


def _any_dense(study: Study, steps: int) -> Result | None:
    """A dense run: what it costs does not depend on its rate."""
    results = (
        read_result(study.folder("dense", rate=r, seed=study.seeds[0], steps=steps)) for r in study.rates
    )
    return next(filter(None, results), None)


def _run_all(study: Study, runs: Sequence[tuple[str, float, int, int]]) -> None:
    """Run those of (arm, rate, seed, steps) that have not ended, ``jobs`` at a time."""
    if not study.jobs:
        return
    # Imported here: torch takes seconds, and to read what is there needs none of it.
    from inrank_megatron.distributed.platform import device_count

    visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), device_count()
    workers: SimpleQueue[int] = SimpleQueue()
    for worker in range(study.jobs):
        workers.put(worker)

    def run_one(run: tuple[str, float, int, int]) -> None:
        worker = workers.get()
        try:
            gpu = gpu_of(worker, visible=visible, count=count)
            _run(study, *run, env={"OMP_NUM_THREADS": "1"} | gpu)
        finally:
            workers.put(worker)

    with ThreadPoolExecutor(study.jobs) as pool:
        list(pool.map(run_one, runs))


def curves(study: Study) -> list[dict]:
    """The validation losses of every run that has finished, whatever arm, rate, seed and steps."""
    rows = []
    for arm in ARMS:
        parent = study.folder(arm, rate=0, seed=0, steps=0).parent
        for folder in sorted(path for path in parent.glob("lr*-seed*-steps*") if path.is_dir()):
            if read_result(folder) is None:
                continue
            rate, seed, steps = re.fullmatch(r"lr(.+)-seed(\d+)-steps(\d+)", folder.name).groups()
            run = {"arm": arm, "lr": float(rate), "seed": int(seed), "steps": int(steps)}
            rows += [run | point for point in read_curve(folder)]
    return rows


def gpu_of(worker: int, *, visible: str | None, count: int) -> dict[str, str]:
    """The environment in which the runs of a worker see one GPU, of ``count`` that are ``visible``."""
    if count == 0:
        return {}
    names = visible.split(",") if visible is not None else [str(index) for index in range(count)]
    return {"CUDA_VISIBLE_DEVICES": names[worker % count].strip()}


def _run(study: Study, arm: str, rate: float, seed: int, steps: int, *, env: Mapping[str, str]) -> None:
    folder = study.folder(arm, rate=rate, seed=seed, steps=steps)
    sizes = {"found": _found(study), "budget": _budget(study)}
    own = flags(arm, steps=steps, multiplier=study.multiplier, model=study.config.model, **sizes)
    if has_ended(folder) or own is None:
        return
    study.notify(f"{folder.relative_to(study.output)} ...")
    folder.parent.mkdir(parents=True, exist_ok=True)
    last = ["--lr", f"{rate:g}", "--seed", str(seed), "--train-iters", str(steps), "--save", str(folder)]
    with log_of(folder).open("w", encoding="utf-8") as log:
        ended = subprocess.run(
            [sys.executable, "-m", LAUNCHER, *study.flags, *own, *last, "--resume", "auto"],
            stdout=log, stderr=subprocess.STDOUT, env=os.environ | env, check=False,
        )  # fmt: skip
        log.write(f"exit status {ended.returncode}\n")
    if not has_ended(folder):
        raise UserError(
            f"{folder}: the run failed with status {ended.returncode}, not for its learning rate; correct "
            f"what the end of {log_of(folder)} says, and give the command again"
        )
    if ended.returncode:
        study.notify(f"the rate is too high: {log_of(folder)}")


def _budget(study: Study) -> Size:
    """The largest rank that all linears can have within the budget."""
    shapes = linear_shapes(study.config).values()
    column = sum(out + inp for out, inp in shapes)
    return Size(study.budget * sum(out * inp for out, inp in shapes) // column, study.budget)


def _found(study: Study) -> Size | None:
    """What InRank-Efficient comes to at its best rate, the mean over the seeds; None: not known yet."""
    steps = study.config.training.train_iters
    rate = _choice(study, FIRST, steps)
    if rate is None:
        return None
    folders = [study.folder(FIRST, rate=rate, seed=seed, steps=steps) for seed in study.seeds]
    if not all(has_ended(folder) for folder in folders):
        return None
    sizes = [result.size for folder in folders if (result := read_result(folder))]
    return Size(fmean(size.rank for size in sizes), fmean(size.share for size in sizes))
