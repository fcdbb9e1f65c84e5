"""A default that a user's setting makes impossible gives way, and says so; what the user gave never does."""

import json
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inrank_megatron.config.checks import check
from inrank_megatron.config.cli import Launch, parse
from inrank_megatron.config.deepspeed_json import passthrough
from inrank_megatron.config.defaults import find_config
from inrank_megatron.config.loading import flatten, to_yaml
from inrank_megatron.config.topology import topology_of
from inrank_megatron.errors import UserError

INRANK, RELORA = ["--inrank"], ["--method", "relora", "--rank", "8"]


def checked(argv: list[str], *, world_size: int) -> Launch:
    launch = parse(argv, world_size=world_size)
    with launch.naming_origins():
        check(launch.config, world_size=world_size)
    return launch


@pytest.mark.parametrize(
    ("argv", "world_size", "adapted"),
    [
        ([*INRANK, "--train-iters", "3"], 2, {"lr_warmup_iters": 0}),
        (["--train-iters", "20"], 1, {"lr_warmup_iters": 2}),
        (["--lr-decay-iters", "15"], 1, {"lr_warmup_iters": 1}),
        (["--hidden-size", "150"], 1, {"num_attention_heads": 3}),
        (["--num-attention-heads", "5"], 1, {"hidden_size": 195}),
        (["--model-type", "llama", "--num-attention-heads", "5"], 1, {"hidden_size": 200}),
        (["--model-type", "llama", "--num-attention-heads", "64", "--kv-channels", "8"], 1, {}),
        (["--max-position-embeddings", "100"], 1, {"seq_length": 100}),
        (["--seq-length", "255"], 2, {"tensor_model_parallel_size": 1}),
        (["--num-attention-heads", "3"], 4, {"tensor_model_parallel_size": 1}),
        (["--bf16", "--zero-stage", "0"], 2, {"tensor_model_parallel_size": 1}),
        (
            ["--seq-length", "255", "--tensor-model-parallel-size", "2"],
            2,
            {"sequence_parallel": False},
        ),
        (["--global-batch-size", "24"], 1, {"micro_batch_size": 12}),
        (["--global-batch-size", "8"], 4, {"micro_batch_size": 4}),
        (RELORA, 1, {"relora_interval": 65}),
        (
            [*RELORA, "--train-iters", "100"],
            1,
            {"relora_interval": 25, "relora_warmup_iters": 2},
        ),
        ([*INRANK, "--no-frozen-base"], 1, {"rank_criterion": "released", "factor_init": "kaiming"}),
        (
            [*INRANK, "--inrank-preset", "released", "--rank-criterion", "update"],
            1,
            {"lr": 0.002, "frozen_base": True},
        ),
        ([*INRANK, "--inrank-preset", "paper", "--hidden-size", "64"], 1, {"lr": 0.002, "buffer": 8}),
        ([*INRANK, "--parameter-budget", "0.3"], 1, {"final_ranks": "output"}),
        ([*INRANK, "--factor-optimizer", "muon", "--final-ranks", "grown"], 1, {}),
        (
            [*INRANK, "--factor-optimizer", "spectron", "--inrank-preset", "paper", "--buffer", "8"],
            1,
            {"lr": 0.002},
        ),
        (
            [*INRANK, "--factor-optimizer", "spectron", "--output-threshold", "0.99"],
            1,
            {"final_ranks": "output"},
        ),
        ([*INRANK, "--qkv-factors", "separate"], 1, {"factorised_linears": "mlp-attention"}),
        ([*INRANK, "--buffer", "191"], 1, {"initial_rank": 1}),
        ([*INRANK, "--initial-rank", "190"], 1, {"buffer": 2}),
        ([*INRANK, "--max-rank", "180"], 1, {"buffer": 12}),
        ([*INRANK, "--max-rank", "1"], 1, {"initial_rank": 1}),
        (
            ["--optimizer", "cpu-adam"],
            1,
            {
                "matrix_optimizer": "adamw",
                "factor_optimizer": "adamw",
                "lr": 0.002,
                "offload_optimizer": True,
            },
        ),
        (
            [*INRANK, "--optimizer", "adamw", "--matrix-optimizer", "muon"],
            1,
            {"factor_optimizer": "adamw", "lr": 0.002},
        ),
        ([*INRANK, "--factor-optimizer", "adamw"], 1, {"lr": 0.002}),
        (
            ["--optimizer", "fused-adam", "--lr", "1e-2"],
            1,
            {"matrix_optimizer": "adamw", "factor_optimizer": "adamw"},
        ),
        (["--matrix-optimizer", "adamw", "--lr", "1e-3"], 1, {}),
        ([*INRANK], 2, {}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_default_gives_way_and_says_so(argv, world_size, adapted):
    launch = checked(argv, world_size=world_size)
    flat = flatten(launch.config)
    assert {name: flat[name] for name in adapted} == adapted
    assert [note.split()[0] for note in launch.notes] == list(adapted)
    assert all(
        f" gives way to {value}: " in n for n, value in zip(launch.notes, adapted.values(), strict=True)
    )


@pytest.mark.parametrize(
    ("argv", "chosen"),
    [
        ([], ("output", 0.5)),
        (["--factor-optimizer", "adamw"], (None, None)),
        (["--final-ranks", "grown"], ("grown", None)),
        (["--output-threshold", "0.9"], ("output", None)),
        (["--inrank-preset", "released"], ("grown", None)),
        (["--method", "warm-start"], (None, None)),
    ],
)
def test_spectra_that_an_optimizer_flattens_choose_no_ranks(argv, chosen):
    """What is chosen in their place is on record."""
    argv = argv if "--method" in argv else [*INRANK, *argv]
    inrank = checked(argv, world_size=1).config.inrank
    assert (inrank.final_ranks, inrank.parameter_budget) == chosen


def test_a_run_that_goes_on_keeps_its_rate(tmp_path):
    """Also one that this project would not have chosen."""
    first = checked(["--optimizer", "adamw", "--lr", "5e-3", "--save", str(tmp_path)], world_size=1)
    (tmp_path / "config.yaml").write_text(to_yaml(first.config))
    again = checked(["--save", str(tmp_path), "--resume", "auto"], world_size=1)
    assert again.config.optimizer == first.config.optimizer and not again.notes


def test_what_the_user_gave_is_refused(tmp_path):
    """By a flag, or in a file that was named."""
    with pytest.raises(UserError, match="lr_warmup_iters = 20: must be less"):
        checked(["--train-iters", "3", "--lr-warmup-iters", "20"], world_size=1)
    file = tmp_path / "own.yaml"
    file.write_text("model_preset: tiny\ntrain_iters: 50\nlr_warmup_iters: 20\n")
    with pytest.raises(UserError, match=rf"\(lr_warmup_iters: from {re.escape(str(file))}\)"):
        checked(["--config", str(file), "--train-iters", "3"], world_size=1)


def test_a_configuration_of_the_project_gives_way_though_it_is_named():
    file = find_config("gpt2_small_inrank.yaml")
    launch = checked(["--config", str(file), "--train-iters", "100"], world_size=8)
    assert launch.config.optimizer.lr_warmup_iters == 10
    [note] = launch.notes
    assert note.startswith("lr_warmup_iters 225 from ") and "gives way to 10" in note


def test_the_same_command_goes_on_with_its_run(tmp_path):
    """What was adapted is in the run's file; the same flags over that file give the same run."""
    for argv in ([*INRANK, "--train-iters", "3"], [*RELORA, "--hidden-size", "150"]):
        first = checked([*argv, "--save", str(tmp_path), "--resume", "auto"], world_size=2)
        (tmp_path / "config.yaml").write_text(to_yaml(first.config))
        again = checked([*argv, "--save", str(tmp_path), "--resume", "auto"], world_size=2)
        assert first.notes and again.config == first.config
        (tmp_path / "config.yaml").unlink()


def test_the_number_of_processes_may_change_for_a_run(tmp_path):
    save = [*INRANK, "--save", str(tmp_path), "--resume", "auto"]
    (tmp_path / "config.yaml").write_text(to_yaml(checked(save, world_size=4).config))
    one = checked(save, world_size=1).config
    assert (one.parallel.tensor_model_parallel_size, one.training.global_batch_size) == (1, 32)


DEEPSPEED = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 0.25,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 1e-4, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0},
    },
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 7, "total_num_steps": 90}},
}


@pytest.fixture
def deepspeed_json(tmp_path) -> Callable[[dict], list[str]]:
    def write(content: dict) -> list[str]:
        (tmp_path / "ds.json").write_text(json.dumps(content))
        return ["--deepspeed-config", str(tmp_path / "ds.json")]

    return write


def test_a_deepspeed_json_takes_the_place_of_defaults(deepspeed_json):
    launch = checked(deepspeed_json(DEEPSPEED), world_size=1)
    passthrough(launch.deepspeed_config, launch.config, topology_of(launch.config, world_size=1))
    optimizer, training = launch.config.optimizer, launch.config.training
    assert (optimizer.lr, optimizer.clip_grad, optimizer.lr_warmup_iters) == (1e-4, 0.25, 7)
    assert (training.bf16, training.global_batch_size, training.micro_batch_size) == (True, 8, 4)


def test_a_deepspeed_json_says_how_often_to_accumulate(deepspeed_json):
    content = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}
    launch = checked(deepspeed_json(content), world_size=2)
    topology = topology_of(launch.config, world_size=2)
    passthrough(launch.deepspeed_config, launch.config, topology)
    assert (topology.global_batch_size, topology.accumulation_steps) == (12, 3)


def test_a_deepspeed_json_does_not_win_over_flags_and_files(deepspeed_json, tmp_path):
    (tmp_path / "own.yaml").write_text("model_preset: tiny\ntrain_iters: 50\n")
    for own in (["--clip-grad", "1"], ["--config", str(tmp_path / "own.yaml"), "--clip-grad", "1"]):
        launch = checked([*own, *deepspeed_json({"gradient_clipping": 0.25})], world_size=1)
        with pytest.raises(UserError, match=r"gradient_clipping = 0\.25: contradicts the run's clip_grad"):
            passthrough(launch.deepspeed_config, launch.config, topology_of(launch.config, world_size=1))


def flag(name: str, *values: object) -> st.SearchStrategy[list[str]]:
    return st.sampled_from([[f"--{name}", str(value)] for value in values])


ANY_FLAGS = [
    flag("train-iters", 1, 2, 3, 19, 20, 21, 100, 5000),
    flag("lr", 0, "1e-5", 0.5),
    flag("min-lr", 0, "1e-4", 0.01),
    flag("lr-warmup-iters", 0, 5, 300),
    flag("lr-decay-iters", 1, 10, 1000),
    flag("hidden-size", 1, 2, 6, 30, 64, 150, 255, 202),
    flag("num-attention-heads", 1, 2, 3, 5, 64),
    flag("ffn-hidden-size", 1, 30, 255),
    flag("seq-length", 1, 31, 255, 2048),
    flag("max-position-embeddings", 1, 100, 4096),
    flag("num-query-groups", 1, 2, 3),
    flag("kv-channels", 7, 16),
    st.sampled_from([["--add-qkv-bias"], ["--qk-layernorm"], ["--untie-embeddings-and-output-weights"]]),
    flag("model-preset", "tiny", "small", "llama-60m", "llama-1.3b", "smollm2-135m", "qwen2.5-0.5b"),
    flag("model-type", "gpt2", "llama"),
    flag("tensor-model-parallel-size", "auto", 1, 2, 3),
    st.just(["--no-sequence-parallel"]),
    flag("micro-batch-size", 1, 3, 8),
    flag("global-batch-size", 1, 7, 8, 48),
    flag("method", "dense", "fixed-rank", "lora", "relora", "inrank", "inrank-efficient", "warm-start"),
    flag("rank", 1, 8, 200),
    flag("inrank-preset", "paper", "released"),
    flag("initial-rank", 1, 2, 190, 200),
    flag("buffer", 1, 100, 191, 192),
    flag("max-rank", 1, 60, 180),
    flag("rank-criterion", "update", "released", "eq7"),
    flag("factor-init", "gradient", "random", "kaiming", "spectral"),
    st.sampled_from([["--frozen-base"], ["--no-frozen-base"], ["--absorb-columns"]]),
    flag("factorised-linears", "mlp", "mlp-attention"),
    flag("qkv-factors", "fused", "separate"),
    flag("switch-iters", 1, 100, 300),
    flag("switch-patience", 3),
    flag("final-ranks", "grown", "refound", "re-estimated", "output"),
    flag("output-threshold", 0.8),
    flag("parameter-budget", 0.001, 0.3),
    flag("rank-multiple-of", 64),
    flag("relora-interval", 1, 10, 1000),
    flag("relora-warmup-iters", 0, 30, 100),
    flag("optimizer", "adamw", "fused-adam", "cpu-adam", "apex-fused-adam", "sgd"),
    flag("zero-stage", 0, 1, 2, 3),
    st.sampled_from([["--bf16"], ["--fp16"], ["--offload-optimizer"]]),
    flag("adam-beta1", 0, 0.99),
    flag("eval-interval", 1000),
    flag("keep-last", 1),
    flag("vocab-size", 10, 300),
    flag("pretrained-checkpoint", "runs/other"),
]


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(
    method=st.sampled_from(
        [[], INRANK, ["--method", "inrank"], RELORA, ["--method", "fixed-rank", "--rank", "8"]]
    ),
    chosen=st.lists(st.integers(0, len(ANY_FLAGS) - 1), min_size=1, max_size=4, unique=True).flatmap(
        lambda which: st.tuples(*(ANY_FLAGS[index] for index in which))
    ),
    world_size=st.sampled_from([1, 2, 3, 4]),
)
def test_a_refusal_is_about_what_the_user_gave(method, chosen, world_size):
    """Of a search among combinations of flags over the default configuration."""
    argv = [*method, *(word for words in chosen for word in words)]
    names = {word[2:].removeprefix("no-") for word in argv if word.startswith("--")}
    names |= {"method"} if "--inrank" in argv else set()
    try:
        checked(argv, world_size=world_size)
    except UserError as error:
        about = str(error).partition(";")[0].replace("_", "-")  # without the remedy
        assert any(re.search(rf"(?<![a-z-]){name}(?![a-z-])|--{name}(?![a-z-])", about) for name in names), (
            error
        )
