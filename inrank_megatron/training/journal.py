"""What the run tells: records in the run folder and lines for the user, from rank 0 alone."""

from contextlib import ExitStack
from typing import Any

from inrank_megatron.methods.changes import LayerView, SetRank
from inrank_megatron.reporting.console import Console
from inrank_megatron.reporting.metrics import MetricsWriter
from inrank_megatron.training.evaluate import Evaluation
from inrank_megatron.training.run_folder import RunFolder

LEADING_VALUES = 64


class Journal:
    """A context manager; on other ranks than 0 every call does nothing."""

    def __init__(self, folder: RunFolder, *, active: bool, total_steps: int, start_step: int):
        self._active = active
        self._stack = ExitStack()
        if active:
            resumed = start_step if (folder.path / "metrics.jsonl").exists() else None
            self._metrics = MetricsWriter(folder.path, resume_step=resumed)
            self._console = Console(total_steps, start_step=start_step)

    def __enter__(self) -> "Journal":
        if self._active:
            self._stack.callback(self._metrics.close)
            self._stack.enter_context(self._console)
        return self

    def __exit__(self, *exception) -> None:
        self._stack.__exit__(*exception)

    def train(self, record: dict[str, Any]) -> None:
        """One optimizer step's record (``reporting/metrics.py``)."""
        if self._active:
            self._metrics.train(**record)
            self._console.step(record)

    def evaluation(self, step: int, split: str, result: Evaluation, *, elapsed_seconds: float) -> None:
        if self._active:
            self._metrics.evaluation(step, split=split, loss=result.loss, perplexity=result.perplexity,
                                     word_perplexity=result.word_perplexity, tokens=result.tokens,
                                     elapsed_seconds=elapsed_seconds)
            words = "" if result.word_perplexity is None else f", {result.word_perplexity:.2f} a word"
            self.message(f"step {step}: {split} loss {result.loss:.4f}, perplexity {result.perplexity:.2f} a token{words}")

    def checks(self, step: int, views: list[LayerView], decisions: list[SetRank]) -> None:
        """The outcome of a rank check, layer by layer."""
        if self._active and decisions:
            seen = {view.name: view for view in views}
            self._metrics.ranks([
                _rank_record(seen[d.layer], step=step, event="check", rank=d.rank, active=d.active,
                             explained_ratio=d.explained_ratio, capped=d.capped) for d in decisions])
            before = [seen[d.layer].rank for d in decisions]
            after = [d.rank for d in decisions]
            if before != after:
                self.message(f"step {step}: ranks grow, mean {sum(before) / len(before):.1f} -> "
                             f"{sum(after) / len(after):.1f}, from {min(after)} to {max(after)} over {len(after)} layers")

    def structure(self, step: int, event: str, views: list[LayerView]) -> None:
        """Ranks at the start (``init``) or after the switch (``switch``)."""
        if self._active:
            self._metrics.ranks([_rank_record(v, step=step, event=event, rank=v.rank, active=v.active,
                                              explained_ratio=None, capped=False) for v in views])

    def event(self, kind: str, step: int, text: str, **values: Any) -> None:
        if self._active:
            self._metrics.event(kind, step, **values)
            self.message(text)

    def message(self, text: str) -> None:
        if self._active:
            self._console.message(text)


def _rank_record(view: LayerView, *, step: int, event: str, rank: int, active: int,
                 explained_ratio: float | None, capped: bool) -> dict[str, Any]:
    return {"step": step, "event": event, "layer": view.name, "rank": rank, "previous_rank": view.rank,
            "explained_ratio": explained_ratio, "active_columns": active, "capacity": view.capacity,
            "capped": capped, "singular_values": list(view.singular_values[:LEADING_VALUES])}
