"""What dense training reached on the same text in the same steps, where such a run was recorded.

``recorded_dense.json`` is written by ``docs/scripts/record_dense.py``.
"""

import json
import math
from pathlib import Path

from inrank_megatron.reporting.run import Record, Run

RECORDS = Path(__file__).with_name("recorded_dense.json")
SAME_TEXT = 0.02
"""Largest relative difference of the unigram perplexity of validation texts that count as the same. Python's
documentation, which the first run reads, differs a little from one version to the next."""


def recorded_dense(run: Run) -> Record | None:
    """The recorded dense run with the sizes, tokens and text of this low-rank run; None if there is none."""
    if not run.ranks or not run.summary.get("finished"):
        return None
    found = fingerprint(run)
    if None in found.values():
        return None
    for record in json.loads(RECORDS.read_text(encoding="utf-8")):
        same = all(record[name] == found[name] for name in ("parameters", "vocab_size", "steps", "tokens"))
        if same and math.isclose(record["unigram"], found["unigram"], rel_tol=SAME_TEXT):
            return record
    return None


def fingerprint(run: Run) -> Record:
    """What two runs must share for their perplexities to be comparable; None where a run does not say it."""
    return {
        "parameters": (run.summary.get("parameters") or {}).get("dense"),
        "vocab_size": run.summary.get("vocab_size"),
        "steps": run.summary.get("steps"),
        "tokens": run.train[-1].get("tokens") if run.train else None,
        "unigram": (run.summary.get("unigram_perplexity") or {}).get("valid"),
    }
