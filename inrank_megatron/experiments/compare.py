"""All methods against one another: real runs of the launcher, each method at its best learning rate.

Every run is a process of its own with a run folder under the output folder. A run that has finished is not
run again, so the grid can be stopped, continued, and read at any time.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from inrank_megatron.experiments.launches import Launch, claim, run_all
from inrank_megatron.experiments.results import has_ended, read_curve, read_result

SETTINGS = "compare.json"


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
    common = {"flags": study.flags, "budget": study.budget, "multiplier": study.multiplier}
    claim(study.output / SETTINGS, common)
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
        if any(result.test is None for result in results):
            raise UserError(f"{folders[0]}: has no test perplexity; compare on data with test text")
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
    """Run those of (arm, rate, seed, steps) that have not ended and whose size is known."""
    if not study.jobs:
        return
    sizes = {"found": _found(study), "budget": _budget(study)}
    launches = []
    for arm, rate, seed, steps in runs:
        own = flags(arm, steps=steps, multiplier=study.multiplier, model=study.config.model, **sizes)
        if own is not None:
            last = ("--lr", f"{rate:g}", "--seed", str(seed), "--train-iters", str(steps))
            folder = study.folder(arm, rate=rate, seed=seed, steps=steps)
            launches.append(Launch(folder, (*study.flags, *own, *last)))
    run_all(launches, jobs=study.jobs, notify=study.notify)


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
