"""Every method starts from a model that transformers wrote, and makes one that transformers loads."""

import math
from pathlib import Path
from statistics import mean

import pytest
import torch
import transformers

from inrank_megatron.interop.command import run as convert
from tests.distributed.hugging_face_losses import first_loss
from tests.distributed.launches import data_flags, launch, records
from tests.unit.interop.models import VOCABULARY, make_tokenizer
from tools.convert_checkpoint import parse as parse_conversion

SHRUNK = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 4000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS = {
    "qwen3": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": True}),
    "llama 3.2": (
        "Llama",
        {"num_key_value_heads": 2, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    ),
}
"""Like the published ones, shrunk. On two ranks Qwen3's one key is shared."""
STEPS = 12
CASES = {
    "inrank": ("qwen3", 2, ["--inrank", "--rank-check-interval", "4", "--switch-iters", "8"]),
    "lora": ("llama 3.2", 1, ["--method", "lora", "--rank", "16"]),
    "relora": (
        "qwen3",
        2,
        ["--method", "relora", "--rank", "16", "--relora-interval", "6", "--relora-warmup-iters", "2"],
    ),
    "warm-start": ("llama 3.2", 1, ["--method", "warm-start", "--switch-iters", "8"]),
}
"""Model, ranks and flags of each method."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return data_flags(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> dict[str, Path]:
    """Folders as the hub has them: random weights in BF16, and a tokenizer."""
    folders = {}
    for name, (kind, settings) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SHRUNK, **settings)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        folders[name] = tmp_path_factory.mktemp(kind)
        model.to(torch.bfloat16).save_pretrained(folders[name])
        make_tokenizer().save(folders[name])
    return folders


@pytest.mark.parametrize("method", CASES)
def test_a_hugging_face_model_is_continued_and_exported(method, public, data, tmp_path):
    model, ranks, flags = CASES[method]
    run, export = tmp_path / "run", tmp_path / "export"
    flags = [*flags, *data, "--pretrained-checkpoint", str(public[model]), "--save", str(run)]
    flags += ["--train-iters", str(STEPS), "--lr", "5e-3", "--seq-length", "64", "--global-batch-size", "8"]
    flags += ["--micro-batch-size", "4", "--tensor-model-parallel-size", str(ranks), "--eval-interval", "6"]
    ended = launch(flags, num_procs=ranks)
    assert ended.process.returncode == 0, ended.stderr
    losses = [record["loss"] for record in records(run, "train")]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert losses[0] == pytest.approx(first_loss(public[model], run), rel=1e-5)
    assert mean(losses[-3:]) < 0.9 * losses[0]
    phases = {record["phase"] for record in records(run, "train")}
    assert len(phases) == (2 if "--switch-iters" in flags else 1)

    kind = "hf-factorised" if "--switch-iters" in flags else "hf-dense"
    convert(parse_conversion([str(run), str(export), "--format", kind]))
    assert first_loss(export, run) < 0.9 * losses[0]
