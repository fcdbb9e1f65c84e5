"""The table, and the file to send back that holds it with everything in JSON."""

import json
import math
from collections import Counter
from pathlib import Path

from tests.gpu.results import PASSED, REPORT, Results

HEAD = ("case", "figure", "measured", "limit", "over dense", "result")
JSON_MARK = "---- everything as JSON ----"


def table(records: list[dict]) -> str:
    """One line for each figure, and for each case without."""
    rows = [HEAD]
    for record in records:
        for figure in record["figures"]:
            limit, dense = figure["limit"], figure["over_dense"]
            result = "" if limit is None else "pass" if figure["passed"] else "FAIL"
            rows.append(
                (
                    record["name"],
                    figure["name"],
                    _number(figure["measured"]),
                    "" if limit is None else _number(limit),
                    "" if dense is None else _number(dense),
                    result if figure["judged"] else "not judged",
                )
            )
        if not record["figures"]:
            rows.append(
                (record["name"], "", "", "", "", "pass" if record["state"] == PASSED else record["state"])
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return "\n".join(_line(row, widths) for row in rows)


def write_report(results: Results, names: list[str]) -> Path:
    """The file to send back; the text first, for people."""
    records = results.of(names)
    missing = [name for name in names if results.find(name) is None]
    path = results.folder / REPORT
    everything = {"machine": results.machine, "missing": missing, "records": records}
    parts = [_machine(results.machine), table(records), failures(records), summary(records, len(names))]
    text = "\n\n".join(part for part in parts if part)
    path.write_text(f"{text}\n\n{JSON_MARK}\n{json.dumps(everything)}\n", encoding="utf-8")
    return path


def summary(records: list[dict], total: int) -> str:
    """How many came to which end."""
    states = Counter(record["state"] for record in records)
    words = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    seconds = sum(record["seconds"] for record in records)
    return f"{len(records)} of {total} cases done in {seconds / 60:.1f} minutes: {words or 'none'}"


def failures(records: list[dict]) -> str:
    """The last lines of what did not come to its end."""
    return "\n\n".join(f"{r['name']}: {r['state']}\n{r['error']}" for r in records if r["error"])


def _machine(machine: dict) -> str:
    names = Counter(gpu["name"] for gpu in machine["gpus"])
    devices = (
        ", ".join(f"{count} x {name}" for name, count in names.items()) or "no GPU: a rehearsal on the CPU"
    )
    driver = (machine["driver"] or "none").splitlines()[0]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    return (
        f"{devices}; driver {driver}, CUDA {machine['cuda']}, NCCL {machine['nccl']}\n"
        f"Python {machine['python']}, {packages}\n"
        f"{machine['cores']} cores, {machine['memory_gib']} GiB, {machine['processor']}, {machine['system']}"
    )


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    left = (f"{row[column]:<{widths[column]}}" for column in (0, 1))
    right = (f"{row[column]:>{widths[column]}}" for column in (2, 3, 4))
    return "  ".join([*left, *right, row[5]]).rstrip()


def _number(value: float) -> str:
    if value == 0 or (math.isfinite(value) and float(value).is_integer() and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.4g}"
