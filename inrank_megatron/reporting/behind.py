"""What is behind each figure of a run: a sentence for who cannot see it, and its points as a table."""

from collections.abc import Callable
from typing import TypeVar

from inrank_megatron.reporting.plots import checks, costs
from inrank_megatron.reporting.run import PHASES, Record, Run, depth, kind_of
from inrank_megatron.reporting.tables import PHASE_TITLES, UNKNOWN, Table, magnitude, number

MOST_ROWS = 25
VALUES = 8  # singular values of a row
Behind = tuple[str, Table]
T = TypeVar("T")


def behind(run: Run, name: str) -> Behind:
    """Alternative text and table of the figure of that name in ``plots.figures``."""
    makers: dict[str, Callable[[Run], Behind]] = {
        "loss": _loss,
        "ranks": _ranks,
        "spectrum": _spectrum,
        "cost": _cost,
        "throughput": _throughput,
    }
    return makers[name](run)


def _loss(run: Run) -> Behind:
    by_step: dict[int, dict[str, float | None]] = {}
    for record in thinned(run.train):
        by_step.setdefault(record["step"], {})["training"] = record.get("loss")
    for record in run.evaluations:
        by_step.setdefault(record["step"], {})[record["split"]] = record.get("loss")
    splits = ("training", "valid", "test")
    rows = [
        [f"{step:,}", *(number(losses.get(split)) for split in splits)]
        for step, losses in sorted(by_step.items())
    ]
    lines = [_course("training", run.train, "loss")]
    lines += [
        _course(split, [e for e in run.evaluations if e["split"] == split], "loss") for split in splits[1:]
    ]
    alt = f"Loss in nats per token over optimizer steps. {' '.join(filter(None, lines))}"
    return alt, Table("", ["step", "training", "validation", "test"], rows)


def _ranks(run: Run) -> Behind:
    layers = run.ranks_by_layer()
    steps = thinned([{"step": step} for step in sorted({record["step"] for record in run.ranks})], most=12)
    heads = ["layer", *(f"step {record['step']:,}" for record in steps)]
    rows = []
    for layer, records in layers.items():
        ranks = {record["step"]: record["rank"] for record in records}
        rows.append([layer, *(str(ranks.get(record["step"], UNKNOWN)) for record in steps)])
    last = [records[-1]["rank"] for records in layers.values()]
    alt = (
        f"Rank of each of {len(layers)} layers over optimizer steps, a panel for each kind of linear. "
        f"The ranks end between {min(last)} and {max(last)}."
    )
    return alt, Table("", heads, rows)


def _spectrum(run: Run) -> Behind:
    rows = []
    for layer, records in checks(run).items():
        for record in dict.fromkeys((0, len(records) - 1)):
            rows.append(_spectrum_row(layer, records[record]))
    heads = ["layer", "step", "rank", "explained", *(f"{place}." for place in range(1, VALUES + 1))]
    alt = (
        "Singular values of each linear of the first and the last block as shares of their sum, at the "
        "first and at the last rank check; those up to the rank are solid."
    )
    return alt, Table("", heads, rows)


def _spectrum_row(layer: str, record: Record) -> list[str]:
    values = [value or 0.0 for value in record["singular_values"]]
    total = record.get("singular_value_sum") or sum(values)
    shares = [f"{value / total:.4f}" if total > 0 else UNKNOWN for value in values[:VALUES]]
    explained = record.get("explained_ratio")
    return [
        f"{depth(layer)} {kind_of(layer)}",
        f"{record['step']:,}",
        str(record["rank"]),
        UNKNOWN if explained is None else f"{explained:.4f}",
        *shares,
        *[UNKNOWN] * (VALUES - len(shares)),
    ]


def _cost(run: Run) -> Behind:
    counted = {name: costs(run, name) for name in ("parameters", "flops_per_token")}
    rows, said = [], []
    for phase, parameters in counted["parameters"].items():
        flops, dense = counted["flops_per_token"].get(phase), counted["flops_per_token"]["dense"]
        title = PHASE_TITLES[PHASES.index(phase)]
        shares = parameters / counted["parameters"]["dense"], flops / dense if flops else None
        rows.append([title, number(parameters), f"{shares[0]:.0%}", number(flops), _percent(shares[1])])
        said.append(f"{title} has {magnitude(parameters)} parameters ({shares[0]:.0%})")
    heads = ["phase", "parameters", "of dense", "FLOPs/token", "of dense"]
    return f"Parameters and FLOPs per token of each phase. {'; '.join(said)}.", Table("", heads, rows)


def _throughput(run: Run) -> Behind:
    rows = [
        [f"{r['step']:,}", number(r.get("tokens_per_second")), number(r.get("tflops_per_second"))]
        for r in thinned(run.train)
    ]
    alt = f"Throughput over optimizer steps. {_course('tokens per second', run.train, 'tokens_per_second')}"
    return alt, Table("", ["step", "tokens/s", "TFLOP/s per device"], rows)


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.0%}"


def _course(name: str, records: list[Record], field: str) -> str:
    """``training: 7.83 at step 1, 5.18 at step 260.``"""
    known = [record for record in records if record.get(field) is not None]
    ends = known if len(known) < 2 else (known[0], known[-1])
    shown = [f"{number(record[field])} at step {record['step']:,}" for record in ends]
    return f"{name}: {', '.join(shown)}." if shown else ""


def thinned(records: list[T], most: int = MOST_ROWS) -> list[T]:
    """Evenly chosen, with the first and the last."""
    if len(records) <= most:
        return records
    return [records[round(place * (len(records) - 1) / (most - 1))] for place in range(most)]
