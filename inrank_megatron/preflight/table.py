"""The table of ``tools/preflight.py``: a row for each fact and value, with the hosts that have it."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from inrank_megatron.preflight.findings import ERROR, WARNING, Finding, HostFacts, rows_of

WIDTH = 110
MOST_HOSTS = 4


@dataclass(frozen=True)
class Row:
    """``verdict``: ``ok``, or the level of the worst finding about the fact on one of the hosts."""

    check: str
    hosts: tuple[str, ...]
    value: str
    verdict: str


def rows(hosts: Sequence[HostFacts], findings: Sequence[Finding]) -> list[Row]:
    """Facts that are shown alike on several hosts, with the same verdict, are one row."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for name in rows_of(hosts):
        for host in hosts:
            if name in host.facts:
                about = {f.level for f in findings if (f.row, f.host) == (name, host.host)}
                verdict = ERROR if ERROR in about else next(iter(about), "ok")
                found.setdefault((name, host.texts[name], verdict), []).append(host.host)
    return [Row(name, tuple(there), value, verdict) for (name, value, verdict), there in found.items()]


def text_of(table: Sequence[Row], findings: Sequence[Finding], *, hosts: int, seconds: float) -> str:
    """The table, then a line for each finding.

    Args:
        hosts: their number. seconds: from the meeting of the processes to the end.
    """
    shown = Table(box=None, pad_edge=False)
    for title in ("check", "hosts", "value", "verdict"):
        shown.add_column(title, overflow="fold")
    for row in table:
        shown.add_row(row.check, _hosts(row.hosts, hosts), row.value, row.verdict)
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None, markup=False, emoji=False).print(shown)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    counts = [sum(finding.level == level for finding in findings) for level in (ERROR, WARNING)]
    end = f"hosts: {hosts}; errors: {counts[0]}; warnings: {counts[1]}; seconds: {seconds:.1f}"
    return "\n".join([*lines, "", *(f"{finding.level}: {finding}" for finding in findings), end])


def json_of(table: Sequence[Row], findings: Sequence[Finding], *, seconds: float) -> dict[str, Any]:
    """The same for programs."""
    return {
        "passed": all(finding.level != ERROR for finding in findings),
        "seconds": round(seconds, 2),
        "rows": [asdict(row) for row in table],
        "findings": [asdict(finding) for finding in findings],
    }


def _hosts(names: tuple[str, ...], count: int) -> str:
    if len(names) == count:
        return f"all {count}" if count > 1 else names[0]
    more = f", {len(names) - MOST_HOSTS} more" if len(names) > MOST_HOSTS else ""
    return ", ".join(names[:MOST_HOSTS]) + more
