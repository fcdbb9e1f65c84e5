"""A run that fails three times in the same way is not started again: launchers would do so for ever."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from inrank_megatron.checkpoint.folder import published, step_of
from inrank_megatron.config.loading import to_yaml
from inrank_megatron.config.schema import Config
from inrank_megatron.errors import UserError
from inrank_megatron.reporting.files import write_atomically

FAILURES, MOST = "failures.json", 3


class Failures:
    """The failures of a run since its newest checkpoint, in a file of its folder. Any rank may note one.

    Args:
        session: the same on all ranks of a job, and another in every job.
    """

    def __init__(self, run: Path, config: Config, *, session: float):
        self._path, self._run, self._session = run / FAILURES, run, session
        self._settings = _digest(config)

    def note(self, message: str) -> None:
        """Count the failure, the first that a rank of this session notes."""
        with suppress(OSError):  # of a disk that is full or gone, which may be the failure
            self._note(message)

    def _note(self, message: str) -> None:
        before = _read(self._path)
        if before and before[-1]["session"] == self._session:
            return
        own = {
            "session": self._session,
            "checkpoint": max(map(step_of, published(self._run / "checkpoints")), default=0),
            "settings": self._settings,
            # What follows, such as the step in which a lost rank was last seen, differs from time to time.
            "failure": message.strip().splitlines()[-1].partition(" (")[0].partition("; ")[0],
        }
        alike = before if before and _is_like(before[-1], own) else []
        write_atomically(self._path, json.dumps([*alike, own], indent=1).encode())

    def clear(self) -> None:
        """The run has not failed."""
        self._path.unlink(missing_ok=True)


def refuse_repeated(run: Path, config: Config) -> None:
    """Raises UserError if the last ``MOST`` sessions have failed alike, with these settings and without a new
    checkpoint.
    """
    failures = _read(run / FAILURES)
    if len(failures) >= MOST and failures[-1]["settings"] == _digest(config):
        last = failures[-1]
        raise UserError(
            f"{run}: has failed {len(failures)} times in the same way after the checkpoint of step "
            f"{last['checkpoint']} ({last['failure']}); correct that, then remove {run / FAILURES} and start "
            "again"
        )


def _read(path: Path) -> list[dict]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []


def _is_like(one: dict, other: dict) -> bool:
    return all(one[name] == other[name] for name in ("checkpoint", "settings", "failure"))


def _digest(config: Config) -> str:
    return hashlib.sha256(to_yaml(config).encode()).hexdigest()
