"""Refuses settings that cannot work, before anything expensive happens.

Pure arithmetic over the settings and the number of processes: no files, no process groups, no torch. Each
section of the settings has a function here; what a method refuses is in the method's own file.
"""

import math
import os
from pathlib import Path

from inrank_megatron.config.loading import OF_LLAMA, resolve
from inrank_megatron.config.schema import Config, DataConfig, ModelConfig
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.registry import METHODS

SMALLEST_VOCABULARY = 257
LARGEST_SCALE_POWER = 40  # far beyond what float16 can hold: each step at such a scale overflows


def check(config: Config, *, world_size: int) -> None:
    """Refuses settings that cannot work together.

    Raises:
        UserError: the value, the rule it breaks and the remedy.
    """
    config = resolve(config, world_size=world_size)
    _check_model(config)
    _check_parallel(config, world_size)
    _check_optimizer(config)
    _check_training(config)
    METHODS[config.training.method].check_settings(config, linear_shapes(config))
    _check_engine(config)
    _check_data(config.data)


def _check_model(config: Config) -> None:
    model = config.model
    h, heads = model.hidden_size, model.num_attention_heads
    if h % heads:
        raise UserError(
            f"num_attention_heads = {heads}: must divide hidden_size = {h}; {_divisors(h, near=heads)}"
        )
    _check_heads(model)
    if model.seq_length > model.max_position_embeddings:
        raise UserError(
            f"seq_length = {model.seq_length}: must not exceed max_position_embeddings = "
            f"{model.max_position_embeddings}; raise --max-position-embeddings or leave it out"
        )


def _check_heads(model: ModelConfig) -> None:
    h, heads, groups, size = model.hidden_size, model.num_attention_heads, model.query_groups, model.head_size
    if model.model_type == "gpt2":
        for name in OF_LLAMA:
            if name != "rotary_base" and getattr(model, name) not in (None, False):
                raise UserError(
                    f"{name} = {getattr(model, name)}: GPT-2 (model_type = 'gpt2') has none; give "
                    f"--model-type llama, or leave --{name.replace('_', '-')} out"
                )
        return
    if heads % groups:
        raise UserError(
            f"num_query_groups = {groups}: must divide num_attention_heads = {heads}; "
            f"{_divisors(heads, near=groups)}"
        )
    if size % 2 and model.kv_channels is not None:
        raise UserError(
            f"kv_channels = {size}: must be even, as RoPE rotates pairs of features; give {size + 1}"
        )
    if size % 2:
        raise UserError(
            f"num_attention_heads = {heads}: leaves {size} features per head, and RoPE rotates pairs "
            f"of features; {_divisors(h // 2, near=heads) if h % 2 == 0 else 'give an even --hidden-size'}"
        )
    if model.add_qkv_bias and model.qk_layernorm:
        raise UserError(
            "add_qkv_bias with qk_layernorm: no published model has both (Qwen2 has biases, Qwen3 norms); "
            "drop one of the two"
        )


def _check_parallel(config: Config, world_size: int) -> None:
    model, tp = config.model, int(config.parallel.tensor_model_parallel_size)  # resolved, so no "auto"
    if world_size % tp:
        raise UserError(
            f"tensor_model_parallel_size = {tp}: must divide the {world_size} processes of this launch; "
            f"{_divisors(world_size, near=tp)}, or start another number of processes"
        )
    legal = math.gcd(model.num_attention_heads, model.hidden_size, world_size)
    for name in ("num_attention_heads", "hidden_size", "ffn_hidden_size"):
        if (size := getattr(model, name)) % tp == 0:
            continue
        remedy = _divisors(legal, near=tp)
        if name == "ffn_hidden_size":
            wider = math.ceil(size / math.lcm(64, tp)) * math.lcm(64, tp)
            remedy = f"{_divisors(math.gcd(legal, size), near=tp)}, or --ffn-hidden-size {wider}"
        raise UserError(f"tensor_model_parallel_size = {tp}: must divide {name} = {size}; {remedy}")
    _check_query_groups(model, tp, math.gcd(legal, model.ffn_hidden_size))
    if config.parallel.sequence_parallel and model.seq_length % tp:
        raise UserError(
            f"seq_length = {model.seq_length}: must be a multiple of tensor_model_parallel_size = {tp} under "
            f"sequence_parallel; give {model.seq_length // tp * tp or tp} or --no-sequence-parallel"
        )
    _check_batch(config, dp=world_size // tp)


def _check_query_groups(model: ModelConfig, tp: int, legal: int) -> None:
    """Megatron's rule: a rank has whole groups, or several ranks share one and compute a part of its key."""
    groups, size = model.query_groups, model.head_size
    fitting = [n for n in range(1, tp + 1) if legal % n == 0 and _shares(groups, size, n)]
    if not _shares(groups, size, tp):
        raise UserError(
            f"tensor_model_parallel_size = {tp}: must be a multiple or a divisor of num_query_groups = "
            f"{groups}, and divide its {groups * size} features of a key; give {fitting[-1]}"
        )


def _shares(groups: int, size: int, tp: int) -> bool:
    return (groups % tp == 0 or tp % groups == 0) and groups * size % tp == 0


def _check_batch(config: Config, *, dp: int) -> None:
    micro, batch = config.training.micro_batch_size, config.training.global_batch_size
    assert batch is not None, "resolved, so no batch is left out"
    unit = micro * dp
    if batch % unit:
        legal = sorted({max(batch // unit, 1) * unit, (batch // unit + 1) * unit})
        raise UserError(
            f"global_batch_size = {batch}: must be micro_batch_size {micro} x accumulation x data-parallel "
            f"size {dp}, a multiple of {unit}; give {' or '.join(map(str, legal))}, or another "
            "--micro-batch-size"
        )


def _check_optimizer(config: Config) -> None:
    optimizer, decay_iters = config.optimizer, config.decay_iters
    if optimizer.min_lr > optimizer.lr:
        raise UserError(
            f"min_lr = {optimizer.min_lr:g}: must not exceed lr = {optimizer.lr:g}; lower --min-lr"
        )
    if optimizer.lr_warmup_iters >= decay_iters:
        raise UserError(
            f"lr_warmup_iters = {optimizer.lr_warmup_iters}: must be less than lr_decay_iters = "
            f"{decay_iters}; lower --lr-warmup-iters or raise --lr-decay-iters"
        )
    decay = optimizer.lr * optimizer.factor_lr_multiplier * optimizer.weight_decay
    if optimizer.factor_optimizer == "lora-muon" and decay >= 1:
        raise UserError(
            f"weight_decay = {optimizer.weight_decay:g}: times the factors' learning rate it is {decay:g}, "
            "and a step of factor_optimizer = 'lora-muon' would keep nothing; lower --lr or --weight-decay"
        )
    for name in ("factor_optimizer", "matrix_optimizer"):
        if (value := getattr(optimizer, name)) != "adamw" and optimizer.optimizer != "adamw":
            raise UserError(
                f"{name} = {value!r} with optimizer = {optimizer.optimizer!r}: torch's AdamW steps all other "
                f"parameters then; give --optimizer adamw, or leave --{name.replace('_', '-')} out"
            )


def _check_training(config: Config) -> None:
    training = config.training
    save, path = training.save, training.pretrained_checkpoint
    if training.resume != "never" and save is None:
        raise UserError("resume = 'auto': needs the folder of the run to continue; name it with --save")
    if save is not None and path is not None and _is_in(path, save):
        raise UserError(
            f"save = {save!r}: is the run that pretrained_checkpoint names; choose another --save, or drop "
            "--pretrained-checkpoint and give --resume auto to continue that run"
        )
    if training.bf16 and training.fp16:
        raise UserError("bf16, fp16: each sets the precision of the run; give one of the two")
    scale = training.initial_loss_scale
    power = min(max(0, round(math.log2(scale))), LARGEST_SCALE_POWER)
    if scale != 2.0**power:
        raise UserError(
            f"initial_loss_scale = {scale:g}: must be a power of two from 1 to 2^{LARGEST_SCALE_POWER}; "
            f"give {2**power}"
        )


def _is_in(checkpoint: str, save: str) -> bool:
    """Whether a checkpoint's path, of a run folder or of one step, is in the run folder ``save``."""
    run, source = (Path(os.path.abspath(os.path.expanduser(name))) for name in (save, checkpoint))
    return run == source or (source.parent.name == "checkpoints" and run == source.parent.parent)


def _check_engine(config: Config) -> None:
    """What DeepSpeed cannot do together."""
    training, parallel, optimizer = config.training, config.parallel, config.optimizer.optimizer
    stage, offload, tp = parallel.zero_stage, parallel.offload_optimizer, parallel.tensor_model_parallel_size
    if training.fp16 and stage == 0:
        raise UserError(
            "zero_stage = 0 with fp16: without ZeRO DeepSpeed divides gradients by a loss scale that it "
            "never multiplied the loss with; give --zero-stage 1, or --bf16"
        )
    if training.bf16 and stage == 0 and tp != 1:
        raise UserError(
            f"zero_stage = 0 with bf16 and tensor_model_parallel_size = {tp}: without ZeRO DeepSpeed takes "
            "one tensor-parallel rank's gradient norm for the full norm; give --zero-stage 1, or drop --bf16"
        )
    if training.on_loss_spike == "skip" and training.bf16 and stage == 0:
        raise UserError(
            "on_loss_spike = 'skip' with zero_stage = 0 and bf16: without ZeRO DeepSpeed cannot leave out an "
            "update of 16-bit parameters; give --zero-stage 1, or --on-loss-spike rollback"
        )
    if offload and stage == 0:
        raise UserError(
            "offload_optimizer with zero_stage = 0: DeepSpeed offloads what ZeRO shards; give --zero-stage "
            "1, 2 or 3"
        )
    if offload and optimizer in ("fused-adam", "apex-fused-adam"):
        raise UserError(
            f"optimizer = {optimizer!r} with offload_optimizer: it computes only on the GPU; give "
            "--optimizer cpu-adam or adamw"
        )
    if optimizer == "apex-fused-adam" and stage == 3:
        raise UserError(
            "optimizer = 'apex-fused-adam' with zero_stage = 3: ZeRO 3 divides a step into parts, and "
            "apex counts each part as a step of every parameter; give --optimizer fused-adam, or "
            "--zero-stage 1 or 2"
        )
    if optimizer == "cpu-adam" and not offload:
        raise UserError(
            "optimizer = 'cpu-adam': needs its state in the host's memory; give --offload-optimizer too, "
            "or --optimizer adamw"
        )


def _check_data(data: DataConfig) -> None:
    size = data.vocab_size
    if data.tokenizer is None and size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size = {size}: a byte-level BPE has at least {SMALLEST_VOCABULARY} tokens, 256 bytes and "
            "the end of a text; raise --vocab-size"
        )
    check_sources(data)


def check_sources(data: DataConfig) -> None:
    """Refuses settings that name more than one training text, or held-out texts alone."""
    named = [name for name in ("data_path", "train_data_path", "dataset") if getattr(data, name) is not None]
    if len(named) > 1:
        raise UserError(f"{', '.join(named)}: each names the training text; give only one of them")
    if data.document_separator is not None and not named:
        raise UserError(
            f"document_separator = {data.document_separator!r}: applies only to a text of your own, and "
            "none is named; give --data-path or --dataset, or leave it out"
        )
    held_out = [name for name in ("valid_data_path", "test_data_path") if getattr(data, name) is not None]
    if held_out and data.train_data_path is None:
        raise UserError(
            f"{', '.join(held_out)}: needs train_data_path, which is missing; give --train-data-path (or "
            "only --data-path, which --split divides)"
        )


def _divisors(number: int, *, near: int) -> str:
    """A remedy: the divisors of `number` next to `near`."""
    below = [n for n in range(min(near, number), 0, -1) if number % n == 0][:1]
    above = [n for n in range(near + 1, min(number, near + 10_000) + 1) if number % n == 0][:1]
    return f"give {' or '.join(map(str, below + above))}"
