"""A run folder as training leaves it, written by the run's own writer."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from inrank_megatron.reporting.metrics import MetricsWriter

LAYERS = [f"decoder.layers.{block}.mlp.linear_{kind}" for block in range(4) for kind in ("fc1", "fc2")]
STEPS, SWITCH, INTERVAL, TOKENS = 120, 60, 10, 1024


def _rank_records(step: int, *, event: str) -> list[dict]:
    records = []
    for index, layer in enumerate(LAYERS):
        growth = 1 - math.exp(-step / 15)
        rank = 2 + round((7 + index) * growth)
        spectrum = [] if event == "init" else [2 * math.exp(-i / (3 + index * growth)) for i in range(32)]
        records.append(
            {
                "step": step,
                "event": event,
                "layer": layer,
                "rank": rank,
                "previous_rank": max(2, rank - 1),
                "explained_ratio": None if event == "init" else 0.9 + index / 100,
                "active_columns": rank + 25,
                "capacity": 96,
                "capped": index == 7 and step >= 30,
                "singular_values": spectrum,
                "singular_value_sum": sum(spectrum),
                "singular_value_square_sum": sum(value * value for value in spectrum),
            }
        )
    return records


def write_run(run_dir: Path, *, method: str = "inrank-efficient", steps: int = STEPS, **changed) -> Path:
    """A run of 4 layers; ``steps`` under ``STEPS`` leaves it unfinished. ``changed``: in its settings."""
    low_rank = method != "dense"
    writer = MetricsWriter(run_dir, resume_step=None)
    if low_rank:
        writer.ranks(_rank_records(0, event="init"))
    for step in range(1, steps + 1):
        phase = 0 if not low_rank else 1 if step <= SWITCH else 2
        loss = 3.9 + 4.4 * math.exp(-step / 25) + 0.08 * math.sin(step * 7.1) + (0.15 if phase == 2 else 0)
        writer.train(
            step,
            loss=loss,
            perplexity=math.exp(loss),
            lr=1e-3 * min(1, step / 10),
            grad_norm=0.4 + 0.1 * math.sin(step),
            tokens=step * TOKENS,
            tokens_per_second=(9100.0 if phase != 2 else 11300.0) + 300 * math.sin(step * 3),
            tflops_per_second=0.11,
            utilisation=None,
            mean_rank=7.3 if low_rank else None,
            phase=phase,
            elapsed_seconds=step * 0.6,
        )
        if low_rank and step % INTERVAL == 0 and step <= SWITCH:
            writer.ranks(_rank_records(step, event="switch" if step == SWITCH else "check"))
        if low_rank and step == SWITCH:
            writer.event("switch", step, seconds=1.2, mean_rank=11.5)
        if step % 40 == 0:
            _evaluate(writer, step, split="valid", loss=loss + 0.1)
    if steps == STEPS:
        _evaluate(writer, steps, split="test", loss=4.15)
        writer.event("checkpoint", steps, path=f"checkpoints/step_{steps:08d}", seconds=0.4)
        (run_dir / "summary.json").write_text(json.dumps(_summary(method)))
    writer.close()
    settings = {"method": method, "train_iters": STEPS, "model_preset": "tiny", "data_path": None, "lr": 1e-3}
    settings |= {"num_layers": 4, "hidden_size": 192, "num_attention_heads": 4, "seq_length": 256}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings | changed))
    return run_dir


def _evaluate(writer: MetricsWriter, step: int, *, split: str, loss: float) -> None:
    words = math.exp(loss * 1.3)
    perplexity = math.exp(loss)
    writer.evaluation(
        step,
        split=split,
        loss=loss,
        perplexity=perplexity,
        word_perplexity=words,
        tokens=5000,
        elapsed_seconds=step,
    )


def _summary(method: str) -> dict:
    phases = (None, None) if method == "dense" else (2_950_000, 1_610_000)
    flops = (None, None) if method == "dense" else (14_100_000, 9_800_000)
    return {
        "method": method,
        "parameters": {"dense": 2_614_000, "phase_1": phases[0], "phase_2": phases[1]},
        "flops_per_token": {"dense": 15_700_000, "phase_1": flops[0], "phase_2": flops[1]},
        "unigram_perplexity": {"valid": 402.0},
        "vocab_size": 4096,
        "world": {"size": 2, "tensor_model_parallel_size": 2, "data_parallel_size": 1, "device": "cpu"},
        "data": {
            "train": {"tokens": 812_000, "documents": 640},
            "valid": {"tokens": 31_000, "documents": 20},
        },
        "peak_memory": {
            "phase_1": {"max_memory_allocated": 3 * 2**30, "max_memory_reserved": 2**32},
            "switch": {"max_memory_allocated": 5 * 2**30, "max_memory_reserved": 2**33},
        },
        "finished": True,
        "steps": STEPS,
        "train_seconds": 72.5,
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder in the test's own folder; takes ``name`` and the arguments of ``write_run``."""

    def make(name: str = "run", **options: Any) -> Path:
        return write_run(tmp_path / name, **options)

    return make
