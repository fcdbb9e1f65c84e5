"""What a run records while it trains: ``metrics.jsonl``, ``ranks.jsonl``, and scalars for its sinks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from inrank_megatron.errors import UserError
from inrank_megatron.reporting.files import json_line, read_records, write_atomically
from inrank_megatron.reporting.sinks.base import FAILURE_SECONDS, BackgroundSink
from inrank_megatron.reporting.sinks.tensorboard import TensorBoard

# Megatron-LM's names, so that runs of both can lie in one TensorBoard.
TRAIN_TAGS = {
    "loss": "lm loss",
    "lr": "learning-rate",
    "grad_norm": "grad-norm",
    "tokens_per_second": "tokens-per-second",
    "tflops_per_second": "throughput",
    "utilisation": "utilisation",
    "max_memory_allocated": "mem-max-allocated-bytes",
    "max_memory_reserved": "mem-max-reserved-bytes",
    "peak_rss": "peak-rss-bytes",
    "loss_scale": "loss-scale",
    "mean_rank": "rank/mean",
    "straggler_factor": "straggler-factor",
}
EVALUATION_TAGS = {"valid": "lm loss validation", "test": "lm loss test"}


class MetricsWriter:
    """Appends a run's records to its folder. One process of the job makes one: rank 0.

    Every line is flushed as it is written, so a killed run keeps all but perhaps its last line. Lines are
    strict JSON; NaN and infinity become ``null``.

    Args:
        run_dir: the run folder; made if absent.
        resume_step: the number of completed optimizer steps that the run continues from. Records of later
            steps, which the run is about to repeat, are removed first. 0 starts the records again. None
            (a new run) accepts no earlier records.
        sinks: where scalars go besides TensorBoard; closed with this.

    Raises:
        UserError: ``resume_step`` is None and the folder holds records already.
    """

    def __init__(self, run_dir: str | Path, *, resume_step: int | None, sinks: Sequence[BackgroundSink] = ()):
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        paths = [run_dir / "metrics.jsonl", run_dir / "ranks.jsonl"]
        for path in paths:
            if resume_step is not None:
                _remove_after(path, resume_step)
            elif path.exists() and path.stat().st_size:
                raise UserError(
                    f"{path} already holds the records of a run, and a new run needs a folder of its own: "
                    "name another with --save, or continue the run with --resume auto"
                )
        self._metrics, self._ranks = (path.open("a", encoding="utf-8") for path in paths)
        self._events = TensorBoard(run_dir, resume_step=resume_step)
        self._sinks = sinks

    def train(self, step: int, **values: float | int | None) -> None:
        """One optimizer step: ``loss``, ``perplexity``, ``lr``, ``grad_norm``, ``tokens`` (cumulative),
        ``tokens_per_second``, ``tflops_per_second`` (per device), ``utilisation`` (0 to 1, or None),
        ``loss_scale`` (None without), ``skipped_steps`` so far, ``tokens_per_second_per_device``,
        the peak of rank 0's memory since the last such record (``distributed/peak_memory.py``),
        ``mean_rank``, ``phase`` (0 dense, 1 W0 + UV, 2 U*V*) and ``elapsed_seconds`` since the run began.
        ``step`` counts completed steps from 1.
        """
        _append(self._metrics, {"kind": "train", "step": step, **values})
        known = {tag: values.get(name) for name, tag in TRAIN_TAGS.items()}
        self._scalars({tag: value for tag, value in known.items() if value is not None}, step)

    def evaluation(
        self,
        step: int,
        *,
        split: str,
        loss: float,
        perplexity: float,
        word_perplexity: float | None,
        tokens: int,
        elapsed_seconds: float,
        part: dict[str, float] | None = None,
    ) -> None:
        """Loss (nats per token) and perplexities of ``split`` (``valid`` or ``test``) after ``step`` steps.
        ``part``: ``loss`` and ``tokens`` of the part that earlier evaluations were over, if they were.
        """
        _append(
            self._metrics,
            {
                "kind": "eval",
                "step": step,
                "split": split,
                "loss": loss,
                "perplexity": perplexity,
                "word_perplexity": word_perplexity,
                "tokens": tokens,
                "part": part,
                "elapsed_seconds": elapsed_seconds,
            },
        )
        tag = EVALUATION_TAGS[split]
        self._scalars({tag: loss, f"{tag} ppl": perplexity}, step)

    def ranks(self, records: list[dict[str, Any]]) -> None:
        """One record per layer of a check: ``step``, ``event`` (``init``, ``check``, ``switch``), ``layer``,
        ``rank``, ``previous_rank``, ``explained_ratio``, ``active_columns``, ``capacity``, ``capped`` and
        ``singular_values`` (the leading ones, descending), ``singular_value_sum`` and
        ``singular_value_square_sum`` (of all).
        """
        for record in records:
            _append(self._ranks, record)
        for step in dict.fromkeys(record["step"] for record in records):
            own = [record for record in records if record["step"] == step]
            self._scalars({f"rank/{record['layer']}": record["rank"] for record in own}, step)

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Anything else that happens once, such as ``switch`` or ``checkpoint``."""
        _append(self._metrics, {"kind": kind, "step": step, **values})

    def faults(self) -> list[str]:
        """A line about each sink that has failed since the last call for the first time."""
        return [line for sink in self._sinks if (line := sink.fault()) is not None]

    def close(self, *, finished: bool = False, failed: bool = False) -> None:
        """Close everything; a second call does nothing. ``failed``: it is an error that ends the run."""
        for stream in (self._metrics, self._ranks):
            with _naming(stream):
                stream.close()
        self._events.close()
        for sink in self._sinks:
            sink.close(finished=finished, **({"patience": FAILURE_SECONDS} if failed else {}))

    def _scalars(self, values: dict[str, float], step: int) -> None:
        self._events.scalars(values, step)
        for sink in self._sinks:
            sink.scalars(values, step)


def _append(stream: TextIO, record: dict[str, Any]) -> None:
    with _naming(stream):
        stream.write(json_line(record))
        stream.flush()


@contextmanager
def _naming(stream: TextIO) -> Iterator[None]:
    """Give an OSError the file's name: a write to an open file has none, nor has its closing."""
    try:
        yield
    except OSError as error:
        error.filename = stream.name
        raise


def _remove_after(path: Path, step: int) -> None:
    """Keep the records up to ``step``; none for 0: a run that starts again repeats those of step 0 too."""
    kept = [record for record in read_records(path) if step and record["step"] <= step]
    write_atomically(path, "".join(map(json_line, kept)).encode())
