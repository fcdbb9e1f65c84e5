"""The files of a run folder: JSON lines that survive a crash, and writes that are whole or absent."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from inrank_megatron.disk import sync

METRICS, RANKS, SAMPLE = "metrics.jsonl", "ranks.jsonl", "sample.json"


def json_line(record: dict[str, Any]) -> str:
    """One line of strict JSON, newline included; a NaN or an infinity, which JSON lacks, becomes ``null``."""
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, objects with a step, in order; none where it is absent or empty.

    A line that is no complete JSON object is left out: a process that is killed while it writes leaves
    such a line behind, and what stands before it is still good.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def write_atomically(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path``: written aside in the same folder, then renamed over whatever is there."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    aside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            # mkstemp makes files that only their owner may read; a report is there to be read.
            os.fchmod(stream.fileno(), 0o644)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)
