"""Everything about a run that can be refused before anything expensive happens.

Pure arithmetic over the settings and the number of processes: no files, no process groups, no torch.
"""

import math
from dataclasses import dataclass

from inrank_megatron.config import Config, resolve
from inrank_megatron.errors import UserError
from inrank_megatron.rank.buffer import default_buffer, default_capacity
from inrank_megatron.schema import DataConfig

SMALLEST_VOCABULARY = 257


@dataclass(frozen=True)
class Topology:
    """What the settings come to on a given number of processes.

    Attributes:
        world_size: processes, = tensor_model_parallel_size x data_parallel_size.
        global_batch_size: sequences a step, = micro_batch_size x accumulation_steps x data_parallel_size.
        vocab_size: the true vocabulary, and `padded_vocab_size` the rows of the embedding.
        min_dim: the smaller dimension of the MLP linears, the largest rank they can have.
        buffer: columns trained beyond the rank (InRank).
        capacity: columns allocated for a factorised linear: the fixed rank, or the largest r + b (InRank).
            0 for a dense run.
    """

    world_size: int
    tensor_model_parallel_size: int
    data_parallel_size: int
    micro_batch_size: int
    accumulation_steps: int
    global_batch_size: int
    vocab_size: int
    padded_vocab_size: int
    min_dim: int
    buffer: int
    capacity: int


def check(config: Config, *, world_size: int, vocab_size: int | None = None) -> Topology:
    """Refuses settings that cannot work together; returns what follows from them.

    Args:
        vocab_size: of the tokenizer; None: `config.data.vocab_size`, that of a tokenizer still to be trained.

    Raises:
        UserError: the value, the rule it breaks and the remedy.
    """
    config = resolve(config, world_size=world_size)
    vocab_size = _vocabulary(config) if vocab_size is None else vocab_size
    tp = config.parallel.tensor_model_parallel_size
    _check_shape(config)
    _check_tensor_parallel(config, world_size)
    _check_schedule(config)
    _check_factors(config)
    check_sources(config.data)
    dp = world_size // tp
    accumulation = _accumulation_steps(config, dp)
    min_dim = min(config.model.hidden_size, config.model.ffn_hidden_size)
    buffer, capacity = _columns(config, min_dim)
    return Topology(
        world_size=world_size,
        tensor_model_parallel_size=tp,
        data_parallel_size=dp,
        micro_batch_size=config.training.micro_batch_size,
        accumulation_steps=accumulation,
        global_batch_size=config.training.global_batch_size,
        vocab_size=vocab_size,
        padded_vocab_size=pad_vocabulary(vocab_size, multiple=config.model.make_vocab_size_divisible_by * tp),
        min_dim=min_dim,
        buffer=buffer,
        capacity=capacity,
    )


def pad_vocabulary(vocab_size: int, *, multiple: int) -> int:
    """The next multiple, as Megatron pads: each tensor-parallel rank then holds equally many rows."""
    return math.ceil(vocab_size / multiple) * multiple


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _check_shape(config: Config) -> None:
    model = config.model
    h, heads = model.hidden_size, model.num_attention_heads
    _require(
        h % heads == 0,
        f"num_attention_heads = {heads}: must divide hidden_size = {h}; {_divisors(h, near=heads)}",
    )
    _require(
        model.seq_length <= model.max_position_embeddings,
        f"seq_length = {model.seq_length}: must not exceed max_position_embeddings = "
        f"{model.max_position_embeddings}; raise --max-position-embeddings or leave it out",
    )


def _check_tensor_parallel(config: Config, world_size: int) -> None:
    tp = config.parallel.tensor_model_parallel_size
    _require(
        world_size % tp == 0,
        f"tensor_model_parallel_size = {tp}: must divide the {world_size} processes of this launch; "
        f"{_divisors(world_size, near=tp)}, or start another number of processes",
    )
    model = config.model
    for name in ("num_attention_heads", "hidden_size", "ffn_hidden_size"):
        size = getattr(model, name)
        _require(
            size % tp == 0,
            f"tensor_model_parallel_size = {tp}: must divide {name} = {size}; "
            f"{_divisors(math.gcd(model.num_attention_heads, model.hidden_size, world_size), near=tp)}",
        )
    _require(
        tp == 1 or not config.parallel.sequence_parallel or model.seq_length % tp == 0,
        f"seq_length = {model.seq_length}: must be a multiple of tensor_model_parallel_size = {tp} under "
        f"sequence_parallel; give {model.seq_length // tp * tp or tp} or --no-sequence-parallel",
    )


def _accumulation_steps(config: Config, dp: int) -> int:
    micro, batch = config.training.micro_batch_size, config.training.global_batch_size
    unit = micro * dp
    legal = " or ".join(str(n) for n in sorted({max(batch // unit, 1) * unit, (batch // unit + 1) * unit}))
    _require(
        batch % unit == 0,
        f"global_batch_size = {batch}: must be micro_batch_size {micro} x accumulation x data-parallel size "
        f"{dp}, a multiple of {unit}; give {legal}, or another --micro-batch-size",
    )
    return batch // unit


def _check_schedule(config: Config) -> None:
    optimizer, training, inrank = config.optimizer, config.training, config.inrank
    decay_iters = config.decay_iters
    _require(
        optimizer.min_lr <= optimizer.lr,
        f"min_lr = {optimizer.min_lr:g}: must not exceed lr = {optimizer.lr:g}; lower --min-lr",
    )
    _require(
        optimizer.lr_warmup_iters < decay_iters,
        f"lr_warmup_iters = {optimizer.lr_warmup_iters}: must be less than lr_decay_iters = "
        f"{decay_iters}; lower --lr-warmup-iters or raise --lr-decay-iters",
    )
    if training.method == "inrank-efficient":
        step = inrank.switch_iters
        _require(
            step is None or inrank.switch_epochs is None,
            f"switch_iters = {step}, switch_epochs = {inrank.switch_epochs}: both set one step; give one",
        )
        _require(
            step is None or step < training.train_iters,
            f"switch_iters = {step}: must be less than train_iters = {training.train_iters}; "
            "lower --switch-iters, raise --train-iters, or give --method inrank",
        )
    if training.method == "relora":
        _require(
            inrank.relora_interval < training.train_iters,
            f"relora_interval = {inrank.relora_interval}: must be less than train_iters = "
            f"{training.train_iters}; lower --relora-interval, or give --method lora, which never merges",
        )
        _require(
            inrank.relora_warmup_iters <= inrank.relora_interval,
            f"relora_warmup_iters = {inrank.relora_warmup_iters}: must not exceed relora_interval = "
            f"{inrank.relora_interval}; lower --relora-warmup-iters",
        )
    _require(
        training.resume == "never" or training.save is not None,
        "resume = 'auto': needs the run folder to go on in; name it with --save",
    )


def _check_factors(config: Config) -> None:
    method, inrank = config.training.method, config.inrank
    start = inrank.factor_init
    if method == "fixed-rank":
        legal: tuple = (None, "spectral", "random")
    elif not method.startswith("inrank"):
        return
    elif inrank.frozen_base:
        legal = (None, "gradient", "random", "kaiming")
    else:
        legal = ("random", "kaiming")
        _require(
            inrank.rank_criterion != "update",
            "rank_criterion = 'update': judges the change beside a frozen W0, and frozen_base is off; give "
            "--rank-criterion released or eq7",
        )
    names = " or ".join(name for name in legal if name)
    _require(
        start in legal,
        f"factor_init = {start!r}: method {method} "
        f"{'without frozen_base ' if not inrank.frozen_base else ''}starts from {names}; "
        "change --factor-init",
    )


def _vocabulary(config: Config) -> int:
    size = config.data.vocab_size
    _require(
        config.data.tokenizer is not None or size >= SMALLEST_VOCABULARY,
        f"vocab_size = {size}: a byte-level BPE has at least {SMALLEST_VOCABULARY} tokens, 256 bytes and the "
        "end of a text; raise --vocab-size",
    )
    return size


def check_sources(data: DataConfig) -> None:
    """Refuses settings that name more than one training text, or held-out texts alone."""
    named = [name for name in ("data_path", "train_data_path", "dataset") if getattr(data, name) is not None]
    _require(len(named) < 2, f"{', '.join(named)}: each names the training text; give only one of them")
    held_out = [name for name in ("valid_data_path", "test_data_path") if getattr(data, name) is not None]
    _require(
        data.train_data_path is not None or not held_out,
        f"{', '.join(held_out)}: belongs to train_data_path, which is missing; give --train-data-path "
        "(or only --data-path, which --split cuts)",
    )


def _columns(config: Config, min_dim: int) -> tuple[int, int]:
    """Buffer and capacity of the MLP linears, 0 where the method has none."""
    method, inrank = config.training.method, config.inrank
    if method == "dense":
        return 0, 0
    if method in ("fixed-rank", "lora", "relora"):
        rank = inrank.rank
        _require(rank is not None, f"rank: method {method} needs one; give --rank, from 1 to {min_dim}")
        _require(rank <= min_dim, f"rank = {rank}: must not exceed {_width(min_dim)}; lower --rank")
        return 0, rank
    buffer = default_buffer(min_dim) if inrank.buffer is None else inrank.buffer
    first = inrank.initial_rank + buffer
    columns = f"initial_rank {inrank.initial_rank} + buffer {buffer} = {first}"
    _require(
        first <= min_dim,
        f"{columns}: must not exceed {_width(min_dim)}; lower --initial-rank or --buffer",
    )
    if inrank.max_rank is None:
        return buffer, default_capacity(min_dim, initial_rank=inrank.initial_rank, buffer=buffer)
    _require(
        inrank.initial_rank <= inrank.max_rank <= min_dim - buffer,
        f"max_rank = {inrank.max_rank}: must lie between initial_rank = {inrank.initial_rank} and "
        f"{min_dim - buffer} ({_width(min_dim)}, less the buffer {buffer}); change --max-rank or --buffer",
    )
    return buffer, inrank.max_rank + buffer


def _width(min_dim: int) -> str:
    return f"{min_dim}, the smaller dimension of the MLP linears"


def _divisors(number: int, *, near: int) -> str:
    """A remedy: the divisors of `number` next to `near`."""
    below = [n for n in range(min(near, number), 0, -1) if number % n == 0][:1]
    above = [n for n in range(near + 1, min(number, near + 10_000) + 1) if number % n == 0][:1]
    return f"give {' or '.join(map(str, below + above))}"
