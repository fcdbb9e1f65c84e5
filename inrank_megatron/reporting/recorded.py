"""What dense training reached on the same text at the same settings, where such a run was recorded.

``recorded_dense.json`` is written by ``docs/scripts/record_dense.py``.
"""

import json
import math
from pathlib import Path

from inrank_megatron.config.schema import ModelConfig, OptimizerConfig
from inrank_megatron.reporting.run import Record, Run

RECORDS = Path(__file__).with_name("recorded_dense.json")
SAME_TEXT = 0.02
"""Largest relative difference of the unigram perplexity of validation texts that count as the same. Python's
documentation, which the first run reads, differs a little from one version to the next."""
OF_TRAINING = ("train_iters", "global_batch_size", "vocab_size", "bf16", "fp16", "pretrained_checkpoint")
OF_FACTORS = {"factor_optimizer", "factor_lr_multiplier"}


def recorded_dense(run: Run) -> Record | None:
    """The recorded dense run of this finished low-rank run's settings and text; None if there is none."""
    unigram = unigram_perplexity(run)
    if not run.ranks or not run.summary.get("finished") or unigram is None:
        return None
    found = dense_settings(run)
    for record in json.loads(RECORDS.read_text(encoding="utf-8")):
        close = math.isclose(record["unigram_perplexity"], unigram, rel_tol=SAME_TEXT)
        if close and record["settings"] == {name: found.get(name) for name in record["settings"]}:
            return record
    return None


def unigram_perplexity(run: Run) -> float | None:
    """Of the validation text."""
    return (run.summary.get("unigram_perplexity") or {}).get("valid")


def dense_settings(run: Run) -> Record:
    """The settings on which the losses of a dense run depend, besides its text and seed."""
    of_both = [*ModelConfig.model_fields, *OptimizerConfig.model_fields]
    names = [name for name in (*of_both, *OF_TRAINING) if name not in OF_FACTORS]
    return {name: run.settings[name] for name in names if name in run.settings}
