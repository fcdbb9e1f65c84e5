"""What the files of a run folder hold where they are as a run wrote them: of each field what can be shown."""

from collections.abc import Callable
from typing import Any

from inrank_megatron.reporting.files import is_step

LARGEST = 1e18
"""Numbers are drawn; a run's largest, FLOPs and tokens, are far below."""
Is = Callable[[Any], bool]


def is_sound(record: dict[str, Any], kind: str) -> bool:
    """Whether a record (a line of ``metrics.jsonl`` of that kind, or of "ranks") is one that a run writes.
    Others are left out, as lines that are cut off are.
    """
    required, optional = _RECORDS[kind]
    if not all(name in record and check(record[name]) for name, check in required.items()):
        return False
    return all(check(record.get(name)) for name, check in optional.items())


def fault_of_summary(summary: dict[str, Any]) -> str | None:
    """The first name in ``summary.json`` whose value is none that a run writes; None where all are."""
    faults = (name for name, check in _SUMMARY.items() if name in summary and not check(summary[name]))
    return next(faults, None)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # false for NaN


def _is_known(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_step_or_absent(value: Any) -> bool:
    return value is None or is_step(value)


def _is_perplexity(value: Any) -> bool:
    return value is None or (type(value) is float and value >= 0) or _is_number(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= 300


def _is_text_or_absent(value: Any) -> bool:
    return value is None or _is_text(value)


def _is_notice(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 2000


def _is_layer(value: Any) -> bool:
    """A name in a block that a model can have: each block gets a colour."""
    return _is_text(value) and all(len(part) <= 4 for part in value.split(".") if part.isdecimal())


def _is_sizes(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_known, value.values()))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_sizes, value.values()))


def _is_spectrum(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_known, value)))


def _is_world(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    counts = ("size", "tensor_model_parallel_size", "data_parallel_size")
    return all(is_step(value.get(name)) for name in counts) and _is_text(value.get("device"))


_TIMES = ("loss", "tokens", "elapsed_seconds")
_RATES = ("tokens_per_second", "tflops_per_second", "utilisation")
_SUMS = ("singular_value_sum", "singular_value_square_sum")
_PEAKS = ("max_memory_allocated", "max_memory_reserved", "peak_rss")
_RECORDS: dict[str, tuple[dict[str, Is], dict[str, Is]]] = {
    "train": (
        {"step": is_step, "phase": lambda value: is_step(value) and value <= 2},
        dict.fromkeys((*_TIMES, *_RATES, *_PEAKS, "mean_rank", "skipped_steps"), _is_known),
    ),
    "eval": (
        {"step": is_step, "split": _is_text, "perplexity": _is_perplexity},
        dict.fromkeys(_TIMES, _is_known) | {"word_perplexity": _is_perplexity},
    ),
    "switch": (
        {"step": is_step},
        {"seconds": _is_known, "size": _is_text_or_absent},
    ),
    "resume": ({"step": is_step}, {}),
    "checkpoint": ({"step": is_step, "path": _is_text}, {}),
    "notice": ({"step": is_step, "text": _is_notice}, {"rank": _is_known, "factor": _is_known}),
    "ranks": (
        {"step": is_step, "layer": _is_layer, "event": _is_text, "rank": is_step},
        {"singular_values": _is_spectrum, "active_columns": _is_step_or_absent}
        | dict.fromkeys(("explained_ratio", *_SUMS, "previous_rank"), _is_known),
    ),
}
"""Kind of record -> what it must have, and what each of its other fields is where it is there."""
_SUMMARY: dict[str, Is] = {
    "method": _is_text,
    "parameters": _is_sizes,
    "flops_per_token": _is_sizes,
    "unigram_perplexity": _is_sizes,
    "vocab_size": is_step,
    "world": _is_world,
    "data": _is_table,
    "peak_memory": _is_table,
    "steps": is_step,
    "train_seconds": _is_known,
    "unfinished": lambda value: value is None or isinstance(value, str),
    "versions": lambda value: isinstance(value, dict),
}
