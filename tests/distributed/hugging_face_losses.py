"""What transformers loses on the tokens of a run."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import inrank_megatron  # noqa: F401  transformers then knows the factorised models
from inrank_megatron.config.loading import load
from inrank_megatron.data.batches import TrainBatches
from inrank_megatron.data.prepare import prepare


def first_loss(model: Path, run: Path) -> float:
    """What transformers' ``model`` loses, in FP32, on the first batch of ``run``."""
    config = load(run / "config.yaml")
    length, rows = config.model.seq_length, config.training.global_batch_size
    data = prepare(config.data).train
    batches = TrainBatches(data, seq_length=length, global_batch_size=rows, seed=config.training.seed)
    tokens = torch.from_numpy(batches.rows(0, 0, rows))
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
