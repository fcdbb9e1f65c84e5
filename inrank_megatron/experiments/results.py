"""What the runs of a comparison left in their folders."""

from pathlib import Path

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.errors import UserError
from inrank_megatron.experiments.arms import Result, Size
from inrank_megatron.reporting.run import Run, read_run

DIVERGED = ("nothing was updated", "overflowed float16")
"""What the launcher says of a loss or gradient that is not finite, in FP32 or BF16 and in FP16."""


def log_of(folder: Path) -> Path:
    """The launcher's output."""
    return folder.with_name(f"{folder.name}.log")


def has_ended(folder: Path) -> bool:
    """Whether a run has finished, or came to no finite loss: a rate can be too high for a method."""
    if read_result(folder) is not None:
        return True
    log = log_of(folder)
    log_text = log.read_text(encoding="utf-8") if log.exists() else ""
    return log_text.endswith("exit status 1\n") and any(words in log_text for words in DIVERGED)


def read_result(folder: Path) -> Result | None:
    """What a run left; None if it has not finished.

    Raises:
        UserError: it has no validation perplexity, by which rates are chosen.
    """
    if not (folder / "summary.json").exists():
        return None
    run = read_run(folder)
    if not run.summary.get("finished"):
        return None
    found, valid = run.summary["parameters"], _perplexity(run, "valid")
    if valid is None:
        raise UserError(f"{run.folder}: has no valid perplexity; train on data with validation text")
    return Result(
        valid=valid,
        test=_perplexity(run, "test"),
        size=_size(run),
        parameters=next(filter(None, (found[name] for name in ("phase_2", "phase_1", "dense")))),
        flops=_flops_until(run)[-1][1],
        seconds=run.train[-1]["elapsed_seconds"],
    )


def _perplexity(run: Run, split: str) -> float | None:
    evaluation = run.last_evaluation(split)
    return None if evaluation is None else evaluation["perplexity"]


def read_curve(folder: Path) -> list[dict[str, float]]:
    """The validation losses of a finished run, each with the steps, tokens and operations before it."""
    run = read_run(folder)
    spent = dict(_flops_until(run))
    tokens = {record["step"]: record["tokens"] for record in run.train}
    return [
        {"step": (step := e["step"]), "tokens": tokens[step], "flops": spent[step], "valid_loss": e["loss"]}
        for e in run.evaluations
        if e["split"] == "valid" and e["step"] in spent
    ]


def _flops_until(run: Run) -> list[tuple[int, float]]:
    """Each recorded step, and the operations of training up to it."""
    flops, tokens, found = 0.0, 0, []
    for record in run.train:
        per_token = 1e12 * record["tflops_per_second"] / record["tokens_per_second"]
        flops += per_token * (record["tokens"] - tokens)
        tokens = record["tokens"]
        found.append((record["step"], flops))
    return found


def _size(run: Run) -> Size | None:
    rank, found = run.train[-1]["mean_rank"], run.summary["parameters"]
    if rank is None or found["phase_2"] is None:
        return rank and Size(rank, share=float("nan"))
    saved = found["dense"] - found["phase_2"]
    return Size(rank, share=1 - saved / _dense_linears(run.settings))


def _dense_linears(settings: dict) -> int:
    return sum(out * inp for out, inp in linear_shapes(from_flat(settings)).values())
