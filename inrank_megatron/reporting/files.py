"""The files of a run folder: JSON lines that survive a crash, and writes that are complete or absent."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from inrank_megatron.checkpoint.disk import sync
from inrank_megatron.errors import UserError

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

    A line that is not a complete JSON object is left out: a process that is killed while it writes leaves
    such a line behind, and what precedes it is still good.

    Raises:
        UserError: it is not a file, or cannot be read.
    """
    if not is_there(path):
        return []
    records = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and is_step(record.get("step")):
                records.append(record)
    return records


def is_step(value: Any) -> bool:
    """Whether a value can be a count of steps."""
    return type(value) is int and 0 <= value < 2**53


def is_there(path: Path) -> bool:
    """Whether there is such a file.

    Raises:
        UserError: what is there is not a plain file, which might be read without end, or cannot be read.
    """
    try:
        if not path.exists() and not path.is_symlink():
            return False
        if not path.is_file():
            raise UserError(f"{path} is not a file: restore it or move it away")
        with path.open("rb"):
            return True
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): make it readable or move it away"
        ) from None


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
