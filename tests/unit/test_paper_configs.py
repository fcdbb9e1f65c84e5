"""The papers' runs: generated, legal, of the paper's sizes, and within the memory of its GPUs."""

import json
import re
import runpy

import pytest

from inrank_megatron.config.checks import check
from inrank_megatron.config.cli import parse
from inrank_megatron.config.costs import parameters
from inrank_megatron.config.topology import topology_of
from tests.harness import ROOT
from tools import plan

SCRIPT = runpy.run_path(str(ROOT / "docs/scripts/paper_configs.py"))
FILES = SCRIPT["files"]()
INRANK = [name for name in FILES if name.startswith("gpt2")]
VOCABULARY = 50257
DENSE = {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080}
# Millions of parameters in table 3, which it prints with three digits.
MILLIONS = {
    "small": {0.8: 81.8, 0.85: 85.5, 0.9: 91.2},
    "medium": {0.8: 194, 0.85: 205, 0.9: 223},
    "large": {0.8: 384, 0.85: 408, 0.9: 445},
}


def launch(name, *flags, world_size=8):
    return parse(["--config", str(ROOT / "configs/paper" / name), *flags], world_size=world_size)


def test_the_files_are_those_of_the_table():
    folder = ROOT / "configs/paper"
    written = {path.name: path.read_text() for path in folder.glob("*.yaml")}
    assert written == FILES, "run python docs/scripts/paper_configs.py"


@pytest.mark.parametrize("name", INRANK)
@pytest.mark.parametrize("devices", [8, 16, 64])
def test_batch_steps_and_tokens_are_the_papers(name, devices):
    config = launch(name, world_size=devices).config
    check(config, world_size=devices)
    topology = topology_of(config, world_size=devices, vocab_size=VOCABULARY)
    micro = topology.micro_batch_size * topology.accumulation_steps * topology.data_parallel_size
    assert micro == topology.global_batch_size == 512
    assert config.training.train_iters == 100 * 225 and config.optimizer.lr_warmup_iters == 225
    assert config.model.seq_length * 512 * config.training.train_iters == 11_796_480_000


@pytest.mark.parametrize("model", SCRIPT["MODELS"], ids=lambda model: model.size)
def test_parameters_are_the_papers(model):
    config = launch(f"gpt2_{model.size}_dense.yaml").config
    assert parameters(config, VOCABULARY).total == DENSE[model.size]
    for threshold, rank in model.ranks.items():
        name = f"gpt2_{model.size}_inrank.yaml"
        assert launch(name, "--threshold", str(threshold)).config.inrank.threshold == threshold
        fixed = launch(f"gpt2_{model.size}_fixed_rank.yaml", "--rank", str(rank)).config
        count = parameters(fixed, VOCABULARY, ranks=rank).total / 1e6
        assert count == pytest.approx(MILLIONS[model.size][threshold], rel=0.005)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        (name, flags)
        for name in FILES
        for flags in [(), ("--fp16",), ("--bf16",)]
        if name in INRANK or not flags
    ],
    ids=str,
)
def test_every_precision_is_planned_and_fits(name, precision):
    [cluster] = re.findall(r"--cluster (\S+)\.", FILES[name])
    if precision == ("--bf16",):
        cluster = "8xA100-80GB"  # V100 has none
    pinned = ("--micro-batch-size", str(launch(name).config.training.micro_batch_size), "--zero-stage", "1")
    words = ["--config", str(ROOT / "configs/paper" / name), "--cluster", cluster, "--json", *pinned]
    words += ["--tensor-model-parallel-size", "1", "--no-offload-optimizer", *precision]
    planned = json.loads(plan.run(plan.options(words)))
    assert planned["rows"][0]["fits"] and planned["rows"][0]["recompute_granularity"] is None
    assert all("hours" in method for method in planned["methods"]), planned["methods"]


@pytest.mark.parametrize("model", SCRIPT["LLAMAS"], ids=lambda model: model.size)
@pytest.mark.parametrize("devices", [4, 8])
def test_reloras_runs_read_the_papers_tokens(model, devices):
    """Batches of 122K to 786K tokens, 1.2 to 23.1 billion in all, 5,000 steps of them at full rank."""
    full, low = (
        launch(f"llama_{model.size}_{name}.yaml", world_size=devices).config for name in SCRIPT["TRAININGS"]
    )
    for config in (full, low):
        check(config, world_size=devices)
        topology = topology_of(config, world_size=devices, vocab_size=32100)
        micro = topology.micro_batch_size * topology.accumulation_steps * topology.data_parallel_size
        assert micro == topology.global_batch_size == model.batch
        assert config.training.save_interval is not None and 5000 % config.training.save_interval == 0
    assert full.training.train_iters == low.training.train_iters + 5000
    tokens = full.training.train_iters * model.batch * full.model.seq_length
    assert tokens == pytest.approx(model.tokens, rel=1e-3)
    assert full.optimizer.lr == float(model.lr) and low.optimizer.min_lr == 0.1 * low.optimizer.lr
    assert low.inrank.relora_interval < low.training.train_iters and low.inrank.rank == 128


@pytest.mark.parametrize(
    ("size", "layers", "width", "ffn"),
    [
        ("60m", 8, 512, 1376),
        ("130m", 12, 768, 2048),
        ("250m", 24, 768, 2560),
        ("350m", 24, 1024, 2736),
        ("1.3b", 24, 2048, 5461),
    ],
)
def test_parameters_of_reloras_models(size, layers, width, ffn):
    """Embedding and head, four matrices of attention, three of the MLP, and norms."""
    count = 2 * 32100 * width + layers * (4 * width**2 + 3 * width * ffn + 2 * width) + width
    assert parameters(launch(f"llama_{size}_dense.yaml").config, 32100).total == count
