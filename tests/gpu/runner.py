"""Runs one case after another, and outlives each of them."""

import traceback
from pathlib import Path

from tests.gpu.cases import Case
from tests.gpu.failures import CaseFailure, last_lines
from tests.gpu.figures import Figure
from tests.gpu.pool import START_SECONDS, Pool
from tests.gpu.programs import Programs
from tests.gpu.results import PASSED

CHECK_SECONDS = 60
"""What the oracle may take."""


class Runner:
    """A context manager; at its end no process of it is left.

    Args:
        folder: for what cases leave to each other, and for logs.
        patience: by how much all limits are multiplied, where the machine has other work to do.
    """

    def __init__(self, folder: Path, *, rehearse: bool, patience: float):
        self._folder, self._rehearse, self._patience = folder, rehearse, patience
        self._oracle = Pool(1, on_gpus=False, folder=folder / "log" / "oracle", patience=patience)
        # A rehearsed rank without others is the same kind of process, whose start takes longest here.
        self._ranks: Pool | None = self._oracle if rehearse else None
        self._programs = Programs(folder / "programs", rehearse=rehearse, patience=patience)

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *exception) -> None:
        for pool in (self._oracle, self._ranks):
            if pool:
                pool.close()

    def seconds_for(self, case: Case) -> float:
        """The most that a case can take now."""
        seconds = case.limit_seconds
        if case.ranks:
            starts = (not self._oracle.alive) + (not self._serves(case))
            seconds += CHECK_SECONDS + starts * START_SECONDS
        return self._patience * seconds

    def run(self, case: Case) -> tuple[str, list[Figure], str]:
        """How a case ended, its figures, and the last lines of what did not come to its end."""
        try:
            figures = self._on_ranks(case) if case.ranks else self._programs.run(case)
        except CaseFailure as failure:
            return failure.state, [], failure.text
        except Exception:  # such as records that a run did not leave: no case ends the others
            return "failed", [], last_lines(traceback.format_exc())
        return (PASSED if all(figure.passed for figure in figures) else "failed"), figures, ""

    def _serves(self, case: Case) -> bool:
        return self._ranks is not None and self._ranks.alive and self._ranks.ranks == case.ranks

    def _on_ranks(self, case: Case) -> list[Figure]:
        if self._ranks is None or self._ranks.ranks != case.ranks:
            if self._ranks and self._ranks is not self._oracle:
                self._ranks.close()
            log = self._folder / "log" / "ranks"
            self._ranks = Pool(case.ranks, on_gpus=not self._rehearse, folder=log, patience=self._patience)
        files = [str(self._folder / f"result{rank}.pickle") for rank in range(case.ranks)]
        request = {"kind": case.kind, "settings": case.settings, "files": files}
        self._ranks.run(request | {"check": False}, seconds=self._patience * case.limit_seconds)
        answer = self._oracle.run(request | {"check": True}, seconds=self._patience * CHECK_SECONDS)
        return [Figure(**figure) for figure in answer["figures"]]
