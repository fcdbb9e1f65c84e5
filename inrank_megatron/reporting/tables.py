"""The tables of the report page."""

import itertools
from typing import Any, NamedTuple

from inrank_megatron.config.sizes import shown_size
from inrank_megatron.reporting.console import duration
from inrank_megatron.reporting.run import PHASES, Record, Run

UNKNOWN = "-"
PHASE_TITLES = {0: "dense", 1: "phase 1: W0 + UV", 2: "phase 2: U*V*"}
PEAKS = {
    "max_memory_allocated": "allocated",
    "max_memory_reserved": "reserved",
    "peak_rss": "of the process, so far",
}


class Table(NamedTuple):
    """With ``heads`` one row per line; without, names and values, which are in two columns if ``wide``."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    wide: bool = False


def magnitude(value: float) -> str:
    """Three significant digits and a metric suffix: ``1.23 M``."""
    for size, suffix in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def number(value: float | None) -> str:
    """For people: ``27.53``, ``402``, ``1.23 M``."""
    if value is None:
        return UNKNOWN
    if abs(value) >= 1e5:
        return magnitude(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def share(value: float | None, whole: float | None) -> str:
    """``62% of dense``."""
    return f"{value / whole:.0%} of dense" if value and whole else ""


def phase_table(run: Run) -> Table:
    """What each phase of the training did and cost."""
    rows, start = [], 0.0
    for phase, group in itertools.groupby(run.train, key=lambda record: record["phase"]):
        records = list(group)
        rows.append(_phase_row(run, phase, records, start=start))
        start = records[-1].get("elapsed_seconds") or start
    heads = [
        "phase",
        "steps",
        "first loss",
        "last loss",
        "validation ppl",
        "tokens/s",
        "TFLOP/s",
        "of peak",
        "time",
    ]
    return Table("Phases", [*heads, "parameters", "FLOPs/token"], rows)


def _phase_row(run: Run, phase: int, records: list[Record], *, start: float) -> list[str]:
    first, last = records[0], records[-1]
    inside = [
        record
        for record in run.evaluations
        if record["split"] == "valid" and first["step"] <= record["step"] <= last["step"]
    ]
    elapsed, utilisation = last.get("elapsed_seconds"), median(records, "utilisation")
    costs = [run.summary.get(name, {}).get(PHASES[phase]) for name in ("parameters", "flops_per_token")]
    return [
        PHASE_TITLES[phase],
        f"{first['step']:,} - {last['step']:,}",
        number(first.get("loss")),
        number(last.get("loss")),
        number(inside[-1].get("perplexity") if inside else None),
        number(median(records, "tokens_per_second")),
        number(median(records, "tflops_per_second")),
        UNKNOWN if utilisation is None else f"{utilisation:.0%}",
        UNKNOWN if elapsed is None else duration(elapsed - start),
        *map(number, costs),
    ]


def evaluation_table(run: Run) -> Table:
    """Every evaluation."""
    rows = [
        [
            record["split"],
            f"{record['step']:,}",
            *(number(record.get(name)) for name in ("loss", "perplexity", "word_perplexity", "tokens")),
        ]
        for record in run.evaluations
    ]
    heads = ["split", "step", "loss", "perplexity per token", "per word", "tokens scored"]
    return Table("Evaluations", heads, rows)


def notice_table(run: Run) -> Table:
    """What was noticed: how the run began, ranks that were slow, jumps of the loss."""
    rows = [[f"{record['step']:,}", record["text"]] for record in run.notices]
    return Table("Notices", ["step", "what"], rows)


def rank_table(run: Run) -> Table:
    """First and last rank of every layer."""
    rows = []
    for layer, records in run.ranks_by_layer().items():
        first, last = records[0], records[-1]
        known = [record for record in records if record.get("explained_ratio") is not None]
        rows.append(
            [
                layer,
                str(first["rank"]),
                str(last["rank"]),
                f"{known[-1]['explained_ratio']:.4f}" if known else UNKNOWN,
                str(last.get("active_columns", UNKNOWN)),
                str(last.get("capacity", UNKNOWN)),
                "yes" if any(record.get("capped") for record in records) else "no",
            ]
        )
    heads = ["layer", "first rank", "last rank", "explained ratio", "active columns", "capacity", "capped"]
    return Table("Ranks", heads, rows)


def memory_table(run: Run) -> Table:
    """The peak of each part of the run."""
    parts = _memory(run)
    known = [name for name in PEAKS if any(part.get(name) for part in parts.values())]
    rows = [
        [part.replace("_", " "), *(shown_bytes(found.get(name)) for name in known)]
        for part, found in parts.items()
    ]
    return Table("Peak memory", ["part", *(PEAKS[name] for name in known)], rows if known else [])


def peaks(run: Run) -> dict[str, float]:
    """Bytes in each phase that is known: allocated on the GPU, or without one taken by the process."""
    return {phase: size for phase, size in _peaks(run).items() if phase in PHASES}


def peak(run: Run) -> float | None:
    """The largest of :func:`peaks`, the start and the switch; None where none is known."""
    return max(_peaks(run).values(), default=None)


def _peaks(run: Run) -> dict[str, float]:
    found = {
        name: part.get("max_memory_allocated") or part.get("peak_rss") for name, part in _memory(run).items()
    }
    return {name: size for name, size in found.items() if size}


def _memory(run: Run) -> dict[str, dict[str, float]]:
    """Of the rank that took most; before the run has ended, of rank 0."""
    parts = dict(run.summary.get("peak_memory") or {})
    if not parts:
        for record in run.train:
            part = parts.setdefault(PHASES[record["phase"]], {})
            part.update({name: max(record[name], part.get(name, 0)) for name in PEAKS if record.get(name)})
    return parts


def shown_bytes(count: float | None) -> str:
    """``3.00 GiB``."""
    return shown_size(int(count)) if count else UNKNOWN


def small_tables(run: Run) -> list[Table]:
    """Memory, data, settings and versions."""
    data = run.summary.get("data", {})
    counts = [
        [split, number(sizes.get("tokens")), number(sizes.get("documents"))] for split, sizes in data.items()
    ]
    return [
        memory_table(run),
        Table("Data", ["split", "tokens", "documents"], counts),
        Table("Settings", [], _pairs(run.settings), wide=True),
        Table("Versions", [], _pairs(run.summary.get("versions", {}))),
    ]


def _pairs(mapping: dict[str, Any]) -> list[list[str]]:
    return [[str(name), "none" if value is None else str(value)] for name, value in mapping.items()]


def median(records: list[Record], name: str) -> float | None:
    """The median of one field, where known."""
    values = sorted(record[name] for record in records if record.get(name) is not None)
    return values[len(values) // 2] if values else None
