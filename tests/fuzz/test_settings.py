"""Configurations in YAML and a user's DeepSpeed JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from inrank_megatron.config.checks import check
from inrank_megatron.config.cli import parse
from inrank_megatron.config.deepspeed_json import passthrough
from inrank_megatron.config.loading import from_flat, load, to_yaml
from inrank_megatron.config.plan import make_plan, render
from inrank_megatron.config.schema import Config
from inrank_megatron.config.topology import topology_of
from inrank_megatron.engine.deepspeed_setup import check_deepspeed
from tests.fuzz.mutate import JSON, YAML, Damage, damages
from tests.fuzz.readers import Reader, attack, intact

SIZES = {
    "lr_warmup_iters": 0,
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "train_iters": 9,
}
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": 1.0,
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 500000, "overlap_comm": True},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": "auto"}},
    "fp16": {"enabled": False},
    "activation_checkpointing": {"profile": False},
    "flops_profiler": {"enabled": False, "top_modules": 1},
    "tensorboard": {"enabled": False, "output_path": "x"},
    "aio": {"block_size": 1048576},
    "data_types": {"grad_accum_dtype": "fp32"},
    "checkpoint": {"tag_validation": "Warn"},
    "comms_logger": {"enabled": False, "prof_ops": []},
}


def configuration(root: Path) -> Path:
    (root / "run.yaml").write_text(to_yaml(from_flat(SIZES | {"method": "inrank"})))
    return root / "run.yaml"


def deepspeed(root: Path) -> Path:
    (root / "ds.json").write_text(json.dumps(DEEPSPEED))
    return root / "ds.json"


def read_configuration(path: Path) -> Config:
    """It survives a second time, and its plan can be shown."""
    config = load(path)
    again = path.with_name("again.yaml")
    again.write_text(to_yaml(config), encoding="utf-8")
    assert load(again) == config
    launch = parse(["--config", str(path)], world_size=1)
    check(launch.config, world_size=1)
    topology = topology_of(launch.config, world_size=1)
    render(make_plan(launch.config, topology, vocab_size=topology.vocab_size, device="cpu"))
    return config


def read_deepspeed(path: Path) -> Any:
    """What is let through DeepSpeed itself takes."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    launch = parse(["--deepspeed-config", str(path), *flags], world_size=1)
    check(launch.config, world_size=1)
    topology = topology_of(launch.config, world_size=1)
    extra = passthrough(launch.deepspeed_config or {}, launch.config, topology)
    check_deepspeed(launch.config, accumulation=topology.accumulation_steps, extra=extra)
    return extra


def without_pipes(*deeper: tuple[str, st.SearchStrategy]) -> st.SearchStrategy[list[Damage]]:
    """A setting may come from a pipe of the shell's, for which a program waits."""
    return damages(*deeper).filter(lambda changes: all(change.kind != "pipe" for change in changes))


READERS = (
    Reader("configuration", configuration, read_configuration, without_pipes(YAML), 80),
    Reader("settings for DeepSpeed", deepspeed, read_deepspeed, without_pipes(JSON), 120),
)


@pytest.mark.parametrize("reader", READERS, ids=str)
def test_damaged_settings_are_read_or_refused(reader, tmp_path):
    tally = attack(reader, intact(reader, tmp_path / "made"), tmp_path / "scratch", examples=reader.examples)
    assert tally.refused and tally.read
