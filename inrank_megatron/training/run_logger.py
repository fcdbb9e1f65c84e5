"""What the run reports: records in the run folder and lines for the user, from rank 0 alone."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from inrank_megatron.lowrank.methods.changes import LayerView, SetRank
from inrank_megatron.reporting.console import Console, unless_nobody_reads
from inrank_megatron.reporting.files import METRICS, RANKS, read_records
from inrank_megatron.reporting.learnt import tells_of_words
from inrank_megatron.reporting.metrics import MetricsWriter
from inrank_megatron.reporting.sinks.base import BackgroundSink
from inrank_megatron.training.evaluate import Evaluation
from inrank_megatron.training.run_folder import RunFolder

LEADING_VALUES = 64


class RunLogger:
    """A context manager; on other ranks than 0 every call does nothing.

    Args:
        start_step: completed steps that the run continues from; records of later ones are removed.
        vocab_size: without padding.
        sinks: opens the sinks of the run, on rank 0.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        active: bool,
        total_steps: int,
        start_step: int,
        vocab_size: int,
        sinks: Callable[[], Sequence[BackgroundSink]] = tuple,
    ):
        self._folder, self._active, self._vocab_size = folder, active, vocab_size
        self._total_steps, self._start_step = total_steps, start_step
        self._sinks, self._finished = sinks, False
        self._stack = ExitStack()

    def __enter__(self) -> "RunLogger":
        if self._active:
            resumed = None if self._folder.is_new else self._start_step
            self._metrics = MetricsWriter(self._folder.path, resume_step=resumed, sinks=self._sinks())
            self._stack.push(self._close)
            if not self._folder.is_new:
                self._metrics.event("resume", self._start_step)
            self._console = self._stack.enter_context(Console(self._total_steps, start_step=self._start_step))
        return self

    def __exit__(self, *exception) -> None:
        self._stack.__exit__(*exception)

    def _close(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._metrics.close(finished=self._finished, failed=kind is not None)
        for fault in self._metrics.faults():
            with unless_nobody_reads():
                print(fault, flush=True)

    def train(self, record: dict[str, Any]) -> None:
        """One optimizer step's record (``reporting/metrics.py``)."""
        if self._active:
            self._metrics.train(**record)
            self._finished = record["step"] == self._total_steps
            with unless_nobody_reads():
                self._console.step(record)
            for fault in self._metrics.faults():
                self.message(fault)

    def evaluation(self, step: int, split: str, result: Evaluation, *, elapsed_seconds: float) -> None:
        if self._active:
            part = result.part
            self._metrics.evaluation(
                step,
                split=split,
                loss=result.loss,
                perplexity=result.perplexity,
                word_perplexity=result.word_perplexity,
                tokens=result.tokens,
                part=None if part is None else {"loss": part.loss, "tokens": part.tokens},
                elapsed_seconds=elapsed_seconds,
            )
            words = ""
            if tells_of_words(result.word_perplexity, self._vocab_size):
                words = f" per token, {result.word_perplexity:.2f} per word"
            self.message(
                f"step {step}: {split} loss {result.loss:.4f}, perplexity {result.perplexity:.2f}{words}"
            )

    def recorded_evaluation(self, step: int, split: str, *, tokens: int) -> Evaluation | None:
        """This evaluation, if an earlier session of the run has recorded it; None on other ranks than 0."""
        if not self._active or step != self._start_step:
            return None
        wanted = {"kind": "eval", "step": step, "split": split, "tokens": tokens}
        for record in read_records(self._folder.path / METRICS):
            if all(record.get(name) == value for name, value in wanted.items()):
                part = record.get("part")
                return Evaluation(
                    record["loss"],
                    tokens,
                    record["word_perplexity"],
                    part and Evaluation(part["loss"], part["tokens"], None),
                )
        return None

    def checks(self, step: int, views: Sequence[LayerView], decisions: list[SetRank]) -> None:
        """The outcome of a rank check, layer by layer."""
        if self._active and decisions:
            seen = {view.name: view for view in views}
            self._metrics.ranks(
                [
                    _rank_record(
                        seen[d.layer],
                        step=step,
                        event="check",
                        rank=d.rank,
                        active_columns=d.active_columns,
                        explained_ratio=d.explained_ratio,
                        capped=d.capped,
                    )
                    for d in decisions
                ]
            )
            before = [seen[d.layer].rank for d in decisions]
            after = [d.rank for d in decisions]
            if before != after:
                means = f"mean {sum(before) / len(before):.1f} -> {sum(after) / len(after):.1f}"
                spread = f"from {min(after)} to {max(after)} over {len(after)} layers"
                self.message(f"step {step}: ranks grow, {means}, {spread}")

    def structure(self, step: int, event: str, views: list[LayerView], *, once: bool = False) -> None:
        """Ranks at the start (``init``) or after the switch (``switch``); ``once``: unless ranks are on
        record already.
        """
        if self._active and not (once and read_records(self._folder.path / RANKS)):
            self._metrics.ranks(
                [
                    _rank_record(
                        v,
                        step=step,
                        event=event,
                        rank=v.rank,
                        active_columns=v.active_columns,
                        explained_ratio=None,
                        capped=False,
                    )
                    for v in views
                ]
            )

    def event(self, kind: str, step: int, text: str, **values: Any) -> None:
        if self._active:
            self._metrics.event(kind, step, **values)
            self.message(text)

    def notice(self, kind: str, step: int, text: str, **values: Any) -> None:
        """An event whose text stays on record, for the report."""
        if self._active:
            self._metrics.event(kind, step, text=text, **values)
            self.message(text)

    def note(self, text: str) -> None:
        """What the user should know of how the run began; it stays on record."""
        if self._active:
            self._metrics.event("note", self._start_step, text=text)
            self.message(text)

    def message(self, text: str) -> None:
        if self._active:
            with unless_nobody_reads():
                self._console.message(text)


def _rank_record(
    view: LayerView,
    *,
    step: int,
    event: str,
    rank: int,
    active_columns: int,
    explained_ratio: float | None,
    capped: bool,
) -> dict[str, Any]:
    return {
        "step": step,
        "event": event,
        "layer": view.name,
        "rank": rank,
        "previous_rank": view.rank,
        "explained_ratio": explained_ratio,
        "active_columns": active_columns,
        "capacity": view.capacity,
        "capped": capped,
        "singular_values": list(view.singular_values[:LEADING_VALUES]),
        "singular_value_sum": sum(view.singular_values),
        "singular_value_square_sum": sum(value * value for value in view.singular_values),
    }
