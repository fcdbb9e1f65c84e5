"""Everything about a run that can be refused before anything expensive happens.

Pure arithmetic over the settings and the number of processes: no files, no process groups, no torch.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from inrank_megatron.config.loading import resolve
from inrank_megatron.config.schema import Config, DataConfig
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.criteria.buffer import default_buffer, default_capacity
from inrank_megatron.lowrank.methods.schedule import SWITCHING

SMALLEST_VOCABULARY = 257
LARGEST_SCALE_POWER = 40  # far beyond any scale that float16 bears: each step at such a scale is lost


@dataclass(frozen=True)
class Topology:
    """What the settings come to on a given number of processes.

    Attributes:
        world_size: processes, = tensor_model_parallel_size x data_parallel_size.
        global_batch_size: sequences a step, = micro_batch_size x accumulation_steps x data_parallel_size.
        vocab_size: the true vocabulary, and `padded_vocab_size` the rows of the embedding.
        min_dim: the smallest dimension of the MLP linears, the largest rank they can have.
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
    tp = int(config.parallel.tensor_model_parallel_size)  # resolved, so no "auto"
    _check_shape(config)
    _check_tensor_parallel(config, world_size)
    _check_schedule(config)
    _check_factors(config)
    _check_pretrained(config)
    _check_engine(config, tp)
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
        model.model_type != "llama" or h // heads % 2 == 0,
        f"num_attention_heads = {heads}: leaves {h // heads} features a head, and RoPE turns pairs of them; "
        f"{_divisors(h // 2, near=heads) if h % 2 == 0 else 'give an even --hidden-size'}",
    )
    _require(
        model.seq_length <= model.max_position_embeddings,
        f"seq_length = {model.seq_length}: must not exceed max_position_embeddings = "
        f"{model.max_position_embeddings}; raise --max-position-embeddings or leave it out",
    )


def _check_tensor_parallel(config: Config, world_size: int) -> None:
    tp = int(config.parallel.tensor_model_parallel_size)  # resolved, so no "auto"
    _require(
        world_size % tp == 0,
        f"tensor_model_parallel_size = {tp}: must divide the {world_size} processes of this launch; "
        f"{_divisors(world_size, near=tp)}, or start another number of processes",
    )
    model = config.model
    for name in ("num_attention_heads", "hidden_size", "ffn_hidden_size"):
        size = getattr(model, name)
        legal = math.gcd(model.num_attention_heads, model.hidden_size, world_size)
        remedy = _divisors(legal, near=tp)
        if name == "ffn_hidden_size":
            wider = math.ceil(size / math.lcm(64, tp)) * math.lcm(64, tp)
            remedy = f"{_divisors(math.gcd(legal, size), near=tp)}, or --ffn-hidden-size {wider}"
        _require(size % tp == 0, f"tensor_model_parallel_size = {tp}: must divide {name} = {size}; {remedy}")
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
    if training.method in SWITCHING:
        _check_switch(config)
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


def _check_switch(config: Config) -> None:
    training, inrank = config.training, config.inrank
    never = "dense" if training.method == "warm-start" else "inrank"
    when = {"switch_iters": inrank.switch_iters, "switch_epochs": inrank.switch_epochs}
    if training.method != "warm-start":
        when["switch_patience"] = inrank.switch_patience
    given = [f"{name} = {value}" for name, value in when.items() if value is not None]
    _require(len(given) < 2, f"{', '.join(given)}: each says when to switch; give one")
    step = inrank.switch_iters
    _require(
        step is None or step < training.train_iters,
        f"switch_iters = {step}: must be less than train_iters = {training.train_iters}; "
        f"lower --switch-iters, raise --train-iters, or give --method {never}",
    )
    _require(
        bool(given) or training.train_iters > 1,
        f"train_iters = 1: leaves no step for the second phase of method {training.method}; raise "
        f"--train-iters, or give --method {never}",
    )
    _check_final_ranks(config)


def _check_final_ranks(config: Config) -> None:
    inrank, warm = config.inrank, config.training.method == "warm-start"
    _require(
        not (warm and inrank.final_ranks in ("grown", "refound")),
        f"final_ranks = {inrank.final_ranks!r}: no rank grows in method warm-start; leave it out, or give "
        "--method inrank-efficient",
    )
    _require(
        inrank.final_ranks != "refound" or inrank.rank_criterion != "eq7",
        "final_ranks = 'refound': equation 7 only judges ranks from the present one up; give "
        "--rank-criterion update or released, or --final-ranks grown",
    )
    targets = {"output_threshold": inrank.output_threshold, "parameter_budget": inrank.parameter_budget}
    given = [f"{name} = {value:g}" for name, value in targets.items() if value is not None]
    _require(len(given) < 2, f"{', '.join(given)}: each chooses the ranks; give one")
    _require(
        not given or warm or inrank.final_ranks == "output",
        f"{', '.join(given)}: chooses the ranks by the layers' outputs, and final_ranks is "
        f"{inrank.final_ranks or 'grown'}; give --final-ranks output, or drop it",
    )
    budget, m = inrank.parameter_budget, inrank.rank_multiple_of
    if budget is not None:
        shapes = linear_shapes(config).values()
        dense, needed = sum(o * i for o, i in shapes), sum(min(m, o, i) * (o + i) for o, i in shapes)
        _require(
            int(budget * dense) >= needed,
            f"parameter_budget = {budget:g}: does not hold {m} columns of every linear, which are "
            f"{needed / dense:.3g} of their parameters; raise --parameter-budget or lower --rank-multiple-of",
        )


def _check_factors(config: Config) -> None:
    method, inrank = config.training.method, config.inrank
    start = inrank.factor_init
    _require(
        method == "dense" or inrank.qkv_factors == "fused" or inrank.factorised_linears == "mlp-attention",
        f"qkv_factors = {inrank.qkv_factors!r}: with factorised_linears = {inrank.factorised_linears!r} "
        "query, key and value have no factors; give --factorised-linears mlp-attention",
    )
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
            "rank_criterion = 'update': judges the change of W0 + U V, and frozen_base is off; give "
            "--rank-criterion released or eq7",
        )
        _require(
            not inrank.absorb_columns,
            "absorb_columns on: is a subtraction from a frozen W0, and frozen_base is off; give "
            "--no-absorb-columns or --frozen-base",
        )
    names = " or ".join(name for name in legal if name)
    _require(
        start in legal,
        f"factor_init = {start!r}: method {method} "
        f"{'without frozen_base ' if not inrank.frozen_base else ''}starts from {names}; "
        "change --factor-init",
    )


def _check_pretrained(config: Config) -> None:
    """Whether the run can start from other weights; whether they are there is for the start to see."""
    training, inrank = config.training, config.inrank
    path, save = training.pretrained_checkpoint, training.save
    if path is None:
        return
    if save is not None:
        run, source = (Path(os.path.abspath(os.path.expanduser(name))) for name in (save, path))
        _require(
            run not in (source, source.parent.parent if source.parent.name == "checkpoints" else source),
            f"save = {save!r}: is the run that pretrained_checkpoint names; choose another --save, or drop "
            "--pretrained-checkpoint and give --resume auto to go on with that run",
        )
    drawn, remedy = "", "--frozen-base"
    if training.method == "fixed-rank" and inrank.factor_init == "random":
        drawn, remedy = "factor_init = 'random'", "--factor-init spectral"
    elif training.method.startswith("inrank") and not inrank.frozen_base:
        drawn = "frozen_base off"
    _require(
        not drawn,
        f"pretrained_checkpoint with {drawn}: factors that are drawn, without a W0, hold nothing "
        f"of its weights; give {remedy}, or drop --pretrained-checkpoint",
    )


def _check_engine(config: Config, tp: int) -> None:
    """What DeepSpeed cannot do together."""
    training, parallel, optimizer = config.training, config.parallel, config.optimizer.optimizer
    stage, offload = parallel.zero_stage, parallel.offload_optimizer
    _require(
        not (training.bf16 and training.fp16),
        "bf16, fp16: each names the precision of the run; give one of the two",
    )
    _require(
        not training.fp16 or stage > 0,
        "zero_stage = 0 with fp16: without ZeRO DeepSpeed divides gradients by a loss scale that it never "
        "multiplied the loss with; give --zero-stage 1, or --bf16",
    )
    _require(
        not training.bf16 or stage > 0 or tp == 1,
        f"zero_stage = 0 with bf16 and tensor_model_parallel_size = {tp}: without ZeRO DeepSpeed takes one "
        "tensor-parallel rank's gradient norm for the whole; give --zero-stage 1, or drop --bf16",
    )
    _require(
        not offload or stage > 0,
        "offload_optimizer with zero_stage = 0: DeepSpeed offloads what ZeRO cuts; give --zero-stage 1, 2 or "
        "3",
    )
    _require(
        not offload or optimizer not in ("fused-adam", "apex-fused-adam"),
        f"optimizer = {optimizer!r} with offload_optimizer: it steps on the GPU alone; give --optimizer "
        "cpu-adam or adamw",
    )
    _require(
        stage < 3 or optimizer != "apex-fused-adam",
        "optimizer = 'apex-fused-adam' with zero_stage = 3: ZeRO 3 steps part by part, and apex counts each "
        "part as a step of every parameter; give --optimizer fused-adam, or --zero-stage 1 or 2",
    )
    _require(
        offload or optimizer != "cpu-adam",
        "optimizer = 'cpu-adam': steps on state in the host's memory; give --offload-optimizer too, or "
        "--optimizer adamw",
    )
    scale = training.initial_loss_scale
    power = min(max(0, round(math.log2(scale))), LARGEST_SCALE_POWER)
    _require(
        scale == 2.0**power,
        f"initial_loss_scale = {scale:g}: must be a power of two from 1 to 2^{LARGEST_SCALE_POWER}; "
        f"give {2**power}",
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
    _require(
        bool(named) or data.document_separator is None,
        f"document_separator = {data.document_separator!r}: belongs to a text of yours, and none is named; "
        "give --data-path or --dataset, or leave it out",
    )
    held_out = [name for name in ("valid_data_path", "test_data_path") if getattr(data, name) is not None]
    _require(
        data.train_data_path is not None or not held_out,
        f"{', '.join(held_out)}: belongs to train_data_path, which is missing; give --train-data-path "
        "(or only --data-path, which --split cuts)",
    )


def _columns(config: Config, min_dim: int) -> tuple[int, int]:
    """Buffer and capacity of the MLP linears, 0 where the method has none."""
    method, inrank = config.training.method, config.inrank
    if method in ("dense", "warm-start"):
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
    return f"{min_dim}, the smaller of hidden_size and ffn_hidden_size"


def _divisors(number: int, *, near: int) -> str:
    """A remedy: the divisors of `number` next to `near`."""
    below = [n for n in range(min(near, number), 0, -1) if number % n == 0][:1]
    above = [n for n in range(near + 1, min(number, near + 10_000) + 1) if number % n == 0][:1]
    return f"give {' or '.join(map(str, below + above))}"
