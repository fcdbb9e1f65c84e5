"""Settings that cannot work together are refused with the value, the rule and the remedy."""

import pytest

from inrank_megatron.config.checks import check
from inrank_megatron.config.deepspeed_json import passthrough
from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.plan import columns_of
from inrank_megatron.config.topology import pad_vocabulary, topology_of
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.criteria.buffer import default_buffer, default_capacity
from inrank_megatron.lowrank.methods.registry import switch_step

BASE = {"model_preset": "tiny", "train_iters": 100}


def config(**settings):
    return from_flat(BASE | settings)


def test_topology_follows_from_the_settings():
    run = config(tensor_model_parallel_size=2, micro_batch_size=2, global_batch_size=24, method="inrank")
    topology = topology_of(run, world_size=8, vocab_size=50257)
    assert (topology.data_parallel_size, topology.accumulation_steps) == (4, 3)
    assert topology.padded_vocab_size == 50432  # as Megatron pads 50257 at size 2


def test_open_settings_are_resolved_for_the_number_of_processes():
    topology = topology_of(config(tensor_model_parallel_size="auto", micro_batch_size=3), world_size=4)
    assert (topology.tensor_model_parallel_size, topology.data_parallel_size) == (2, 2)
    assert (topology.global_batch_size, topology.accumulation_steps, topology.vocab_size) == (6, 1, 4096)


@pytest.mark.parametrize(("size", "tp", "padded"), [(50257, 1, 50304), (50257, 8, 51200), (128, 1, 128)])
def test_vocabulary_is_padded_as_megatron_does(size, tp, padded):
    assert pad_vocabulary(size, multiple=128 * tp) == padded


def test_default_buffer_and_capacity_are_the_papers():
    assert [default_buffer(width) for width in (768, 1024, 1280, 192, 4, 1)] == [100, 100, 100, 25, 1, 1]
    assert [default_buffer(width, orthogonalised=True) for width in (768, 192, 1)] == [288, 72, 1]
    assert default_capacity(768, initial_rank=2, buffer=100) == 384
    assert default_capacity(192, initial_rank=2, buffer=150) == 152
    assert default_capacity(64, initial_rank=2, buffer=62) == 64


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ({"method": "dense"}, (0, 0)),
        ({"method": "warm-start"}, (0, 0)),
        ({"method": "fixed-rank", "rank": 192}, (0, 192)),
        ({"method": "relora", "rank": 8, "relora_interval": 60}, (0, 8)),
        (
            {"method": "inrank", "frozen_base": False, "factor_init": "kaiming", "rank_criterion": "eq7"},
            (25, 96),
        ),
        ({"method": "inrank", "buffer": 190}, (190, 192)),
        ({"method": "inrank", "max_rank": 40}, (25, 65)),
        ({"method": "inrank", "max_rank": 167}, (25, 192)),
        ({"method": "inrank", "ffn_hidden_size": 64}, (8, 32)),
    ],
)
def test_columns_follow_from_the_settings(settings, columns):
    run = config(**settings)
    check(run, world_size=1)
    assert columns_of(run) == columns


BAD = [
    (2, {"tensor_model_parallel_size": 3}, ["tensor_model_parallel_size = 3", "2 processes", "give 2"]),
    (1, {"tensor_model_parallel_size": 2}, ["tensor_model_parallel_size = 2", "1 processes", "give 1"]),
    (
        6,
        {"tensor_model_parallel_size": 3},
        ["tensor_model_parallel_size = 3", "num_attention_heads = 4", "give 2"],
    ),
    (
        3,
        {"tensor_model_parallel_size": 3, "num_attention_heads": 3, "ffn_hidden_size": 100},
        ["ffn_hidden_size = 100", "give 1, or --ffn-hidden-size 192"],
    ),
    (1, {"num_attention_heads": 5}, ["num_attention_heads = 5", "hidden_size = 192", "give 4 or 6"]),
    (
        1,
        {"model_type": "llama", "num_attention_heads": 64},
        ["num_attention_heads = 64", "3 features per head", "RoPE", "give 48 or 96"],
    ),
    (
        2,
        {"model_preset": "llama-1.3b", "tensor_model_parallel_size": 2},
        ["tensor_model_parallel_size = 2", "ffn_hidden_size = 5461", "give 1, or --ffn-hidden-size 5504"],
    ),
    (
        1,
        {"method": "lora", "rank": 4, "factor_optimizer": "lora-muon", "lr": 20.0, "weight_decay": 0.1},
        ["weight_decay = 0.1", "it is 2", "lower --lr"],
    ),
    (1, {"num_query_groups": 2}, ["num_query_groups = 2", "GPT-2", "--model-type llama"]),
    (
        1,
        {"model_type": "llama", "num_query_groups": 3},
        ["num_query_groups = 3", "num_attention_heads = 4", "give 2 or 4"],
    ),
    (1, {"model_type": "llama", "kv_channels": 7}, ["kv_channels = 7", "RoPE", "give 8"]),
    (
        1,
        {"model_type": "llama", "add_qkv_bias": True, "qk_layernorm": True},
        ["add_qkv_bias with qk_layernorm", "drop one"],
    ),
    (
        4,
        {
            "model_type": "llama",
            "num_attention_heads": 12,
            "num_query_groups": 3,
            "tensor_model_parallel_size": 4,
        },
        ["tensor_model_parallel_size = 4", "num_query_groups = 3", "give 1"],
    ),
    (
        1,
        {"pretrained_checkpoint": "runs/a/checkpoints/step_00000004", "save": "runs/../runs/a"},
        ["save = 'runs/../runs/a'", "pretrained_checkpoint", "another --save"],
    ),
    (1, {"pretrained_checkpoint": "runs/a", "save": "runs/a"}, ["save = 'runs/a'", "--resume auto"]),
    (
        1,
        {"pretrained_checkpoint": "a", "method": "fixed-rank", "rank": 8, "factor_init": "random"},
        ["factor_init = 'random'", "pretrained_checkpoint", "--factor-init spectral"],
    ),
    (
        1,
        {"pretrained_checkpoint": "a", "method": "inrank", "inrank_preset": "released"},
        ["frozen_base off", "pretrained_checkpoint", "--frozen-base"],
    ),
    (1, {"method": "lora", "rank": 8, "qkv_factors": "separate"}, ["'separate'", "'mlp'", "mlp-attention"]),
    (1, {"max_position_embeddings": 128}, ["seq_length = 256", "max_position_embeddings = 128", "raise"]),
    (2, {"tensor_model_parallel_size": 2, "seq_length": 255}, ["seq_length = 255", "multiple", "give 254"]),
    (
        2,
        {"micro_batch_size": 4, "global_batch_size": 12},
        [
            "global_batch_size = 12",
            "4 x accumulation x data-parallel size 2",
            "multiple of 8",
            "give 8 or 16",
        ],
    ),
    (2, {"micro_batch_size": 4, "global_batch_size": 2}, ["global_batch_size = 2", "give 8,"]),
    (1, {"min_lr": 1e-2}, ["min_lr = 0.01", "lr = 0.0006"]),
    (1, {"lr_warmup_iters": 100}, ["lr_warmup_iters = 100", "lr_decay_iters = 100"]),
    (1, {"method": "inrank-efficient", "switch_iters": 100}, ["switch_iters = 100", "train_iters = 100"]),
    (
        1,
        {"method": "inrank-efficient", "switch_iters": 10, "switch_epochs": 1},
        ["switch_iters = 10", "give one"],
    ),
    (
        1,
        {"method": "inrank-efficient", "switch_epochs": 1, "switch_patience": 3},
        ["switch_epochs = 1.0, switch_patience = 3", "give one"],
    ),
    (1, {"method": "warm-start", "switch_iters": 100}, ["switch_iters = 100", "--method dense"]),
    (1, {"method": "warm-start", "final_ranks": "grown"}, ["final_ranks = 'grown'", "inrank-efficient"]),
    (
        1,
        {"method": "inrank-efficient", "final_ranks": "re-estimated", "rank_criterion": "eq7"},
        ["final_ranks = 're-estimated'", "equation 7", "--rank-criterion update"],
    ),
    (
        1,
        {"method": "warm-start", "output_threshold": 0.8, "parameter_budget": 0.5},
        ["output_threshold = 0.8, parameter_budget = 0.5", "give one"],
    ),
    (
        1,
        {"method": "inrank-efficient", "parameter_budget": 0.5},
        ["parameter_budget = 0.5", "final_ranks is grown", "--final-ranks output"],
    ),
    (
        1,
        {"method": "warm-start", "parameter_budget": 0.006},
        ["parameter_budget = 0.006", "rank 1 in every linear", "0.00651", "raise --parameter-budget"],
    ),
    (
        1,
        {"method": "warm-start", "parameter_budget": 0.3, "rank_multiple_of": 64},
        ["parameter_budget = 0.3", "rank 64", "--rank-multiple-of"],
    ),
    (
        1,
        {
            "method": "warm-start",
            "parameter_budget": 0.006,
            "factorised_linears": "mlp-attention",
        },
        ["parameter_budget = 0.006", "0.00"],
    ),
    (1, {"resume": "auto"}, ["resume = 'auto'", "--save"]),
    (1, {"method": "fixed-rank"}, ["rank: method fixed-rank", "--rank, from 1 to 192"]),
    (1, {"method": "fixed-rank", "rank": 193}, ["rank = 193", "192, the smaller of"]),
    (1, {"method": "lora"}, ["rank: method lora", "--rank, from 1 to 192"]),
    (1, {"method": "relora", "rank": 8}, ["relora_interval = 1000", "train_iters = 100", "--method lora"]),
    (
        1,
        {"method": "relora", "rank": 8, "relora_interval": 20},
        ["relora_warmup_iters = 50", "relora_interval = 20"],
    ),
    (1, {"method": "inrank", "factor_init": "spectral"}, ["factor_init = 'spectral'", "gradient or random"]),
    (1, {"method": "inrank", "frozen_base": False}, ["rank_criterion = 'update'", "released or eq7"]),
    (
        1,
        {"method": "inrank", "frozen_base": False, "rank_criterion": "released"},
        ["factor_init = None", "without frozen_base", "random or kaiming"],
    ),
    (
        1,
        {"method": "inrank", "frozen_base": False, "rank_criterion": "released", "absorb_columns": True},
        ["absorb_columns on", "--no-absorb-columns or --frozen-base"],
    ),
    (1, {"method": "fixed-rank", "rank": 8, "factor_init": "gradient"}, ["'gradient'", "spectral or random"]),
    (1, {"method": "inrank", "buffer": 191}, ["initial_rank 2 + buffer 191 = 193", "192", "lower"]),
    (1, {"method": "inrank", "initial_rank": 192}, ["initial_rank 192 + buffer 25 = 217", "192"]),
    (1, {"method": "inrank", "initial_rank": 9, "max_rank": 8}, ["max_rank = 8", "initial_rank = 9", "167"]),
    (1, {"method": "inrank", "max_rank": 168}, ["max_rank = 168", "167", "less the buffer 25"]),
    (1, {"data_path": "a", "dataset": "b"}, ["data_path, dataset", "only one"]),
    (1, {"vocab_size": 256}, ["vocab_size = 256", "257", "--vocab-size"]),
    (1, {"test_data_path": "a"}, ["test_data_path", "--train-data-path"]),
    (1, {"bf16": True, "fp16": True}, ["bf16, fp16", "give one of the two"]),
    (1, {"fp16": True, "zero_stage": 0}, ["zero_stage = 0 with fp16", "--zero-stage 1, or --bf16"]),
    (
        2,
        {"bf16": True, "zero_stage": 0, "tensor_model_parallel_size": 2},
        ["zero_stage = 0 with bf16 and tensor_model_parallel_size = 2", "--zero-stage 1, or drop --bf16"],
    ),
    (1, {"offload_optimizer": True, "zero_stage": 0}, ["offload_optimizer with zero_stage = 0", "1, 2 or 3"]),
    (
        1,
        {"offload_optimizer": True, "optimizer": "fused-adam"},
        ["optimizer = 'fused-adam' with offload_optimizer", "--optimizer cpu-adam or adamw"],
    ),
    (
        1,
        {"offload_optimizer": True, "optimizer": "apex-fused-adam"},
        ["optimizer = 'apex-fused-adam' with offload_optimizer", "--optimizer cpu-adam or adamw"],
    ),
    (
        1,
        {"zero_stage": 3, "optimizer": "apex-fused-adam"},
        [
            "optimizer = 'apex-fused-adam' with zero_stage = 3",
            "--optimizer fused-adam",
            "--zero-stage 1 or 2",
        ],
    ),
    (1, {"optimizer": "cpu-adam"}, ["optimizer = 'cpu-adam'", "--offload-optimizer", "--optimizer adamw"]),
    (
        1,
        {"factor_optimizer": "muon", "optimizer": "sgd"},
        ["factor_optimizer = 'muon' with optimizer = 'sgd'", "--optimizer adamw", "--factor-optimizer out"],
    ),
    (
        1,
        {"matrix_optimizer": "muon", "optimizer": "fused-adam"},
        ["matrix_optimizer = 'muon' with optimizer = 'fused-adam'", "--matrix-optimizer out"],
    ),
    (1, {"initial_loss_scale": 1000.0}, ["initial_loss_scale = 1000", "power of two", "give 1024"]),
    (1, {"initial_loss_scale": 0.5}, ["initial_loss_scale = 0.5", "give 1"]),
    (1, {"initial_loss_scale": 2.0**64}, ["initial_loss_scale", "to 2^40", "give 1099511627776"]),
    (1, {"initial_loss_scale": 1.7e308}, ["initial_loss_scale", "give 1099511627776"]),
]


@pytest.mark.parametrize(("world", "settings", "words"), BAD, ids=[str(settings) for _, settings, _ in BAD])
def test_impossible_runs_get_one_clear_line(world, settings, words):
    with pytest.raises(UserError) as caught:
        check(config(**settings), world_size=world)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


ENGINES = [
    (1, {"zero_stage": 0}),
    (2, {"zero_stage": 0, "tensor_model_parallel_size": 2}),
    (2, {"zero_stage": 0, "bf16": True}),
    (2, {"zero_stage": 3, "fp16": True, "tensor_model_parallel_size": 2}),
    (1, {"zero_stage": 2, "optimizer": "cpu-adam", "offload_optimizer": True}),
    (1, {"optimizer": "sgd", "offload_optimizer": True, "bf16": True}),
    (1, {"optimizer": "fused-adam", "zero_stage": 0}),
    (1, {"factor_optimizer": "spectron", "matrix_optimizer": "muon", "fp16": True, "zero_stage": 3}),
    (1, {"optimizer": "apex-fused-adam", "zero_stage": 2}),
    (1, {"fp16": True, "initial_loss_scale": 1.0}),
    (1, {"fp16": True, "initial_loss_scale": 2.0**40}),
]


@pytest.mark.parametrize(("world", "settings"), ENGINES, ids=[str(settings) for _, settings in ENGINES])
def test_engines_that_deepspeed_can_run_pass(world, settings):
    check(config(**settings), world_size=world)


def test_settings_of_other_methods_do_not_matter():
    others = {"buffer": 500, "rank": 1000, "switch_iters": 500, "qkv_factors": "separate"}
    check(config(method="dense", **others), world_size=1)
    check(config(method="inrank", parameter_budget=0.001, switch_iters=500, switch_patience=1), world_size=1)
    check(config(method="warm-start", switch_iters=5, switch_patience=1, buffer=500), world_size=1)


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({"train_iters": 200}, 30),
        ({"train_iters": 40}, 10),
        ({"switch_iters": 7}, 7),
        ({"switch_epochs": 2}, 60),
        ({"switch_epochs": 0.01}, 1),
        ({"train_iters": 2}, 1),
        ({"method": "inrank"}, None),
        ({"method": "dense", "switch_iters": 500}, None),
        ({"method": "warm-start", "train_iters": 200}, 30),
        ({"method": "warm-start", "switch_iters": 7, "switch_patience": 2}, 7),
        ({"switch_patience": 2}, None),
    ],
)
def test_switch_step_follows_from_the_settings(settings, step):
    run = config(**({"method": "inrank-efficient"} | settings))
    assert switch_step(run, steps_per_epoch=30) == step


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"switch_epochs": 4},
            ["switch_epochs = 4 (120 steps at 30 an epoch)", "100 steps", "raise train_iters"],
        ),
        ({"switch_iters": 100}, ["switch_iters = 100"]),
        ({"train_iters": 1}, ["train_iters = 1"]),
    ],
)
def test_a_switch_after_the_end_is_refused(settings, words):
    with pytest.raises(UserError) as caught:
        switch_step(config(**({"method": "inrank-efficient"} | settings)), steps_per_epoch=30)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def deepspeed(given, **settings):
    run = config(micro_batch_size=2, global_batch_size=8, **settings)
    return passthrough(given, run, topology_of(run, world_size=2))


def test_agreeing_deepspeed_json_passes_and_keeps_the_rest():
    given = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1,
        "bf16": {"enabled": False},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "zero_optimization": {
            "stage": 1,
            "reduce_bucket_size": 1000,
            "offload_optimizer": {"device": "none"},
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 6e-4, "betas": [0.9, 0.95], "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 0, "total_num_steps": 100}},
        "wall_clock_breakdown": True,
        "steps_per_print": "auto",
    }
    assert deepspeed(given) == {
        "fp16": {"loss_scale": 0},
        "zero_optimization": {"reduce_bucket_size": 1000},
        "wall_clock_breakdown": True,
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train_batch_size": 16}, ["train_batch_size = 16", "global_batch_size = 8"]),
        (
            {"train_micro_batch_size_per_gpu": 4},
            ["train_micro_batch_size_per_gpu = 4", "micro_batch_size = 2"],
        ),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps = 1", "accumulation = 2"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping = 0.5", "clip_grad = 1.0"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled = True", "bf16 = False"]),
        ({"bf16": {"check_grad_overflow": False}}, ["check_grad_overflow = False", "= True"]),
        ({"zero_optimization": {"compute_grad_norm": False}}, ["compute_grad_norm = False", "= True"]),
        (
            {"fp16": {"fp16_master_weights_and_grads": True}},
            ["fp16.fp16_master_weights_and_grads = True", "not available yet"],
        ),
        ({"fp16": {"enabled": True}}, ["fp16.enabled = True", "fp16 = False"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage = 3", "zero_stage = 1"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            ["offload_optimizer.device = 'cpu'", "offload_optimizer = 'none'"],
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel", "not available yet"]),
        ({"elasticity": {"enabled": True}}, ["elasticity.enabled = True", "not available yet"]),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            ["data_types.grad_accum_dtype = 'bf16'", "gradient accumulation = 'fp32'"],
        ),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type = 'Lamb'", "AdamW"]),
        ({"bf16": True}, ["bf16 = True", "must be an object"]),
        ({"zero_optimization": 1}, ["zero_optimization = 1", "must be an object"]),
        ({"optimizer": "AdamW"}, ["optimizer = 'AdamW'", "must be an object"]),
        ({"optimizer": {"params": {"beta": [0.9, 0.95]}}}, ["optimizer.params.beta", "did you mean betas"]),
        ({"optimizer": {"params": {"amsgrad": True}}}, ["amsgrad = True", "AdamW = False"]),
        ({"optimizer": {"type": "AdamW", "foo": 1}}, ["optimizer.foo", "no such setting"]),
        ({"scheduler": {"type": ["WarmupLR"]}}, ["scheduler.type = ['WarmupLR']", "WarmupCosineLR"]),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_type": "log"}}},
            ["warmup_type = 'log'", "'linear'"],
        ),
        ({"optimizer": {"params": {"lr": 1e-3}}}, ["optimizer.params.lr = 0.001", "lr = 0.0006"]),
        ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, ["[0.9, 0.999]", "[0.9, 0.95]", "adam_beta2"]),
        ({"optimizer": {"params": {"eps": "1e-8"}}}, ["optimizer.params.eps = '1e-8'", "adam_eps = 1e-08"]),
        ({"scheduler": {"type": "WarmupDecayLR"}}, ["'WarmupDecayLR' (linear)", "lr_decay_style = 'cosine'"]),
        ({"scheduler": {"type": "OneCycle"}}, ["'OneCycle'", "WarmupCosineLR"]),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 5}}},
            ["warmup_num_steps = 5", "lr_warmup_iters = 0"],
        ),
    ],
    ids=str,
)
def test_contradicting_deepspeed_json_names_both_values(given, words):
    with pytest.raises(UserError) as caught:
        deepspeed(given)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


FP16 = {"fp16": True, "initial_loss_scale": 1024.0, "loss_scale_window": 7, "hysteresis": 3}
AGREES = [
    ({"zero_optimization": {"stage": 3}}, {"zero_stage": 3}),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, {"offload_optimizer": True}),
    (
        {
            "fp16": {
                "enabled": True,
                "loss_scale": 0,
                "initial_scale_power": 10,
                "loss_scale_window": 7,
                "hysteresis": 3,
                "min_loss_scale": 1,
            }
        },
        FP16,
    ),
    ({"optimizer": {"type": "AdamW"}}, {}),
    ({"optimizer": {"type": "Adam", "params": {"torch_adam": True}}}, {}),
    (
        {"optimizer": {"type": "AdamW", "params": {"torch_adam": False, "adam_w_mode": True}}},
        {"optimizer": "fused-adam"},
    ),
    ({"optimizer": {"type": "Adam"}}, {"optimizer": "cpu-adam", "offload_optimizer": True}),
    ({"optimizer": {"type": "AdamW"}}, {"optimizer": "apex-fused-adam"}),
    (
        {"optimizer": {"type": "SGD", "params": {"momentum": 0.8, "nesterov": False, "weight_decay": 0.1}}},
        {"optimizer": "sgd", "sgd_momentum": 0.8},
    ),
]


@pytest.mark.parametrize(("given", "settings"), AGREES, ids=[str(given) for given, _ in AGREES])
def test_what_the_run_decides_is_taken_out_of_an_agreeing_json(given, settings):
    assert deepspeed(given, **settings) == {}


DIFFERS = [
    ({"zero_optimization": {"stage": 2}}, {"zero_stage": 3}, ["stage = 2", "zero_stage = 3"]),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "none"}}},
        {"offload_optimizer": True},
        ["device = 'none'", "offload_optimizer = 'cpu'"],
    ),
    ({"fp16": {"loss_scale": 128}}, FP16, ["fp16.loss_scale = 128", "dynamic loss scaling = 0"]),
    (
        {"fp16": {"initial_scale_power": 16}},
        FP16,
        ["power = 16", "initial_loss_scale, 2^ = 10"],
    ),
    ({"fp16": {"loss_scale_window": 1000}}, FP16, ["1000", "loss_scale_window = 7"]),
    ({"fp16": {"hysteresis": 2}}, FP16, ["fp16.hysteresis = 2", "hysteresis = 3"]),
    ({"fp16": {"min_loss_scale": 2}}, FP16, ["min_loss_scale = 2", "smallest loss scale = 1"]),
    ({"optimizer": {"type": "SGD"}}, {}, ["optimizer.type = 'SGD'", "optimizer = 'adamw'", "give AdamW"]),
    ({"optimizer": {"type": "AdamW"}}, {"optimizer": "sgd"}, ["'AdamW'", "optimizer = 'sgd'", "give SGD"]),
    (
        {"optimizer": {"params": {"torch_adam": True}}},
        {"optimizer": "fused-adam"},
        ["torch_adam = True", "optimizer AdamW = False"],
    ),
    (
        {"optimizer": {"params": {"momentum": 0.5}}},
        {"optimizer": "sgd"},
        ["momentum = 0.5", "sgd_momentum = 0.9"],
    ),
    ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, {"optimizer": "sgd"}, ["betas", "no such setting"]),
]


@pytest.mark.parametrize(
    ("given", "settings", "words"), DIFFERS, ids=[f"{given} {list(set_)}" for given, set_, _ in DIFFERS]
)
def test_contradicting_engine_settings_are_refused(given, settings, words):
    with pytest.raises(UserError) as caught:
        deepspeed(given, **settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)
