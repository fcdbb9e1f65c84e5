"""The tables of a page of several runs: a row for each run or, of settings, a column."""

from collections.abc import Mapping
from statistics import fmean

from inrank_megatron.reporting.console import duration
from inrank_megatron.reporting.run import PHASES, Run, flops_spent
from inrank_megatron.reporting.tables import UNKNOWN, Table, median, number, peak, shown_bytes

Runs = Mapping[str, Run]


def run_table(runs: Runs) -> Table:
    """Which run is which, and how far it came."""
    rows = []
    for name, run in runs.items():
        total = run.settings.get("train_iters")
        steps = f"{run.last_step:,}" + (f" of {total:,}" if isinstance(total, int) else "")
        world = run.summary.get("world")
        where = f"{world['size']} x {world['device']}" if world else UNKNOWN
        method = str(run.summary.get("method") or run.settings.get("method") or UNKNOWN)
        rows.append([name, str(run.folder.resolve()), method, steps, number(tokens(run)), where])
    return Table("Runs", ["run", "folder", "method", "steps", "tokens", "processes"], rows)


def tokens(run: Run) -> float | None:
    """Trained on, as far as is recorded."""
    return run.train[-1].get("tokens")


def result_table(runs: Runs) -> Table:
    """The last losses, perplexities and ranks on record."""
    rows = []
    for name, run in runs.items():
        valid, test = (run.last_evaluation(split) or {} for split in ("valid", "test"))
        known = [e["perplexity"] for e in run.evaluations if e["split"] == "valid" and e["perplexity"]]
        ranks = [records[-1]["rank"] for records in run.ranks_by_layer().values()]
        rows.append(
            [
                name,
                number(run.train[-1].get("loss")),
                number(valid.get("perplexity")),
                f"{valid['step']:,}" if valid else UNKNOWN,
                number(min(known, default=None)),
                number(test.get("perplexity")),
                number((run.summary.get("unigram_perplexity") or {}).get("valid")),
                f"{fmean(ranks):.1f} ({min(ranks)} to {max(ranks)})" if ranks else UNKNOWN,
            ]
        )
    perplexities = ["validation ppl", "at step", "lowest validation ppl", "test ppl", "unigram ppl"]
    return Table("Results", ["run", "last training loss", *perplexities, "mean rank"], rows)


def cost_table(runs: Runs) -> Table:
    """What each run took: counted (parameters, FLOPs) and measured (memory, time)."""
    rows = []
    for name, run in runs.items():
        sizes, flops = (_against_dense(run, key) for key in ("parameters", "flops_per_token"))
        spent = flops_spent(run)
        rates = [
            number(median([record for record in run.train if record["phase"] == phase], "tokens_per_second"))
            for phase in sorted({record["phase"] for record in run.train})
        ]
        rows.append(
            [
                name,
                *sizes,
                *flops,
                number(spent[-1] if spent else None),
                shown_bytes(peak(run)),
                UNKNOWN if run.elapsed_seconds is None else duration(run.elapsed_seconds),
                " / ".join(rates),
            ]
        )
    counted = ["parameters", "of dense", "FLOPs/token", "of dense", "FLOPs of training"]
    return Table("Costs", ["run", *counted, "peak memory", "time", "tokens/s by phase"], rows)


def _against_dense(run: Run, key: str) -> list[str]:
    last, dense = run.last_cost(key), (run.summary.get(key) or {}).get(PHASES[0])
    return [number(last), f"{last / dense:.0%}" if last and dense else UNKNOWN]


def settings_table(runs: Runs) -> Table:
    """Those that differ; where a run folder is does not count."""
    names = list(dict.fromkeys(name for run in runs.values() for name in run.settings if name != "save"))
    rows = [[name, *(_shown(run, name) for run in runs.values())] for name in names]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    nothing = [["(none)", *[UNKNOWN] * len(runs)]]
    return Table("Settings that differ", ["setting", *runs], differing or nothing)


def _shown(run: Run, name: str) -> str:
    value = run.settings.get(name)
    return UNKNOWN if name not in run.settings else "none" if value is None else str(value)
