"""The folder of results: one line per case, and the one file to send back."""

import json
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from tests.gpu.figures import Figure
from tests.gpu.pool import ROOT

RECORDS, MACHINE, REPORT = "records.jsonl", "machine.json", "gpu-report.txt"
IDENTITY = ("gpus", "driver", "packages", "python")
PASSED = "passed"
GOOD = (PASSED, "skipped")
"""Ends that no one has to look into."""


class OtherMachineError(Exception):
    """The folder holds results of another machine or of other versions."""


class Results:
    """What has been found so far.

    Raises:
        OtherMachineError: see there.
    """

    def __init__(self, folder: Path, machine: dict):
        self.folder, self.machine = folder, machine
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / MACHINE
        known = json.loads(file.read_text()) if file.exists() else machine
        if differing := [name for name in IDENTITY if known[name] != machine[name]]:
            raise OtherMachineError(
                f"{folder} holds results of another machine or installation (other {', '.join(differing)}); "
                "give another folder with --results"
            )
        file.write_text(json.dumps(machine, indent=1))
        lines = (folder / RECORDS).read_text().splitlines() if (folder / RECORDS).exists() else []
        self._records = {record["name"]: record for record in map(_whole, lines) if record}

    def find(self, name: str) -> dict | None:
        """The newest record of a case."""
        return self._records.get(name)

    def add(self, name: str, *, state: str, figures: Iterable[Figure], error: str, seconds: float) -> dict:
        """Record a case; its line is there, whatever comes."""
        record = {
            "name": name,
            "state": state,
            "seconds": round(seconds, 1),
            "figures": [vars(figure) | {"passed": figure.passed} for figure in figures],
            "error": error,
            "commit": _commit(),
            "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        with (self.folder / RECORDS).open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._records[name] = record
        return record

    def of(self, names: Iterable[str]) -> list[dict]:
        """The records of these cases that there are."""
        return [self._records[name] for name in names if name in self._records]


def _whole(line: str) -> dict | None:
    """None: the line that a kill cut."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
