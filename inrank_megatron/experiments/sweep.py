"""Learning rates and seeds of one configuration: real runs, a row for each, and which rate is best."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from inrank_megatron.config.checks import check
from inrank_megatron.config.cli import parse
from inrank_megatron.config.flags import kebab
from inrank_megatron.config.loading import flatten
from inrank_megatron.errors import UserError
from inrank_megatron.experiments.arms import Result
from inrank_megatron.experiments.launches import Launch, Notify, claim, run_all
from inrank_megatron.experiments.results import read_result

SETTINGS, TABLE, PICTURE = "sweep.json", "sweep.csv", "sweep.png"
VARIED = {"lr": "--rates", "seed": "--seeds", "save": "--output"}
"""Settings that differ from run to run -> the option that gives them."""
UNUSED = ("resume", "dry-run", "cluster")
"""Flags of the launcher that mean nothing here: every run goes on where it stopped."""


@dataclass(frozen=True)
class Sweep:
    """``flags``: the launcher's, of every run. ``rates`` and ``seeds`` have no duplicates."""

    output: Path
    flags: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]

    def launch(self, rate: float, seed: int) -> Launch:
        folder = self.output / f"lr{rate:g}-seed{seed}"
        return Launch(folder, (*self.flags, "--lr", f"{rate:g}", "--seed", str(seed)))


def measure(sweep: Sweep, *, jobs: int, notify: Notify) -> dict[float, list[Result | None]]:
    """What came of each rate, lowest first, a result for each seed; None: its loss was not finite.

    Every rate and every seed is checked before the first run starts.

    Raises:
        UserError: a wrong flag, a folder with runs of other settings, or a run that failed.
    """
    names = {kebab(word).partition("=")[0].removeprefix("--") for word in sweep.flags}
    for name in names & {*VARIED, *UNUSED}:
        why = f"{VARIED[name]} gives it" if name in VARIED else "it has no meaning here"
        raise UserError(f"--{name}: not a flag of a sweep, as {why}; leave it out")
    rates = sorted(sweep.rates)
    first = sweep.seeds[0]
    for rate, seed in [*((rate, first) for rate in rates), *((rates[0], seed) for seed in sweep.seeds)]:
        launch = parse(sweep.launch(rate, seed).flags, world_size=1)
        with launch.naming_origins():
            check(launch.config, world_size=1)
    common = {name: value for name, value in flatten(launch.config).items() if name not in VARIED}
    claim(sweep.output / SETTINGS, common | {"deepspeed_config": launch.deepspeed_config})
    # All rates with one seed come first: they show early whether the rates are well chosen.
    run_all([sweep.launch(rate, seed) for seed in sweep.seeds for rate in rates], jobs=jobs, notify=notify)
    return {rate: [read_result(sweep.launch(rate, seed).folder) for seed in sweep.seeds] for rate in rates}


def run_rows(found: dict[float, list[Result | None]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One for each run. Perplexities a token; ``flops`` and ``seconds`` of training."""
    return [
        {"lr": rate, "seed": seed} | (dict.fromkeys(_FIGURES) if result is None else _figures(result))
        for rate, results in found.items()
        for seed, result in zip(seeds, results, strict=True)
    ]


_FIGURES = ("valid_perplexity", "test_perplexity", "parameters", "flops", "seconds")


def _figures(result: Result) -> dict[str, Any]:
    values = (result.valid, result.test, result.parameters, round(result.flops), round(result.seconds, 1))
    return dict(zip(_FIGURES, values, strict=True))


def rate_rows(found: dict[float, list[Result | None]]) -> list[dict[str, Any]]:
    """One for each rate: mean and standard deviation over its seeds, which all must have finished."""
    best, rows = best_of(found), []
    for rate, results in found.items():
        ended = [result for result in results if result is not None]
        whole = len(ended) == len(results)
        valid = [result.valid for result in ended]
        tests = [result.test for result in ended if result.test is not None]
        rows.append(
            {
                "lr": rate,
                "valid_perplexity": [(result and result.valid) or "diverged" for result in results],
                "mean": fmean(valid) if whole else None,
                "deviation": stdev(valid) if whole and len(valid) > 1 else None,
                "test_mean": fmean(tests) if whole and tests else None,
                "seconds": round(fmean(result.seconds for result in ended)) if ended else None,
                "best": "best" if rate == best else "",
            }
        )
    return rows


def best_of(found: dict[float, list[Result | None]]) -> float | None:
    """The rate of the lowest mean validation perplexity; one that diverged with any seed has none."""
    means = {
        rate: fmean(result.valid for result in results if result is not None)
        for rate, results in found.items()
        if None not in results
    }
    return min(means, key=means.__getitem__, default=None)


def verdict(found: dict[float, list[Result | None]]) -> str:
    """The best rate in a sentence, and whether the rates that were tried leave it open."""
    best, rates = best_of(found), list(found)
    if best is None:
        return f"no rate finished with every seed: try rates below {rates[0]:g}"
    text = f"best: lr {best:g}"
    if len(rates) == 1:
        return f"{text}, the only rate tried"
    if best == rates[-1]:
        text += f"; the best rate is the highest tried: try higher, such as {2 * best:g}"
    elif best == rates[0]:
        text += f"; the best rate is the lowest tried: try lower, such as {best / 2:g}"
    close = [f"{rate:g}" for rate in rates if rate != best and _within_spread(found[best], found[rate])]
    return text + (f"; the seeds' spread does not tell it from {', '.join(close)}" if close else "")


def _within_spread(best: list[Result | None], other: list[Result | None]) -> bool:
    """Whether two means differ by less than the larger standard deviation over the seeds."""
    if None in other or len(other) < 2:
        return False
    ours, theirs = ([result.valid for result in each if result is not None] for each in (best, other))
    return fmean(theirs) - fmean(ours) < max(stdev(ours), stdev(theirs))


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows of `run_rows` with a head; empty where a run diverged."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def picture(found: dict[float, list[Result | None]]) -> bytes:
    """A PNG: validation perplexity of every run over its rate, the means as a line, the best marked."""
    # Imported here: a mistake on the command line need not wait for Matplotlib.
    from matplotlib.figure import Figure

    from inrank_megatron.reporting.page import png
    from inrank_megatron.reporting.plots import styled

    figure, best = Figure(figsize=(7, 4), layout="constrained"), best_of(found)
    axes = styled(figure.subplots(), x="learning rate", y="validation perplexity per token")
    axes.set_xscale("log")
    points = [(rate, result.valid) for rate, results in found.items() for result in results if result]
    axes.plot(*zip(*points, strict=True), ".", color="#7b8794", label="runs")
    means = [(row["lr"], row["mean"]) for row in rate_rows(found) if row["mean"] is not None]
    if best is not None:
        axes.plot(*zip(*means, strict=True), "-o", color="#2f6fb2", label="mean over the seeds")
        axes.plot(best, dict(means)[best], "o", color="#c2571a", label=f"best: {best:g}")
    axes.set_xticks(list(found), [f"{rate:g}" for rate in found])
    axes.minorticks_off()
    axes.legend()
    return png(figure)
