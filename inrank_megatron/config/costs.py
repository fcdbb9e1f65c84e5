"""Parameters, operations and memory of a GPT-2 or LLaMA, dense or with factorised linears.

Letters: h hidden_size, f ffn_hidden_size, L layers, S seq_length, V vocabulary, O x I the shape of a
linear, k columns of its factors U [O, k] and V [k, I], n tensor-parallel size; in attention a heads, g groups
that share key and value, d features per head.
"""

from dataclasses import dataclass, replace

from inrank_megatron.config.activation_costs import activation_bytes, gathered_factor_bytes, shared_features
from inrank_megatron.config.orthogonalisation_costs import orthogonalisation_bytes, orthogonalised_entries
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import Ranks, alike, factorises_attention, is_llama, qkv_layout
from inrank_megatron.config.topology import Topology
from inrank_megatron.lowrank.methods.registry import METHODS

LARGEST_BUCKET = 500_000_000
"""Largest number of entries in the bucket in which DeepSpeed reduces gradients: DeepSpeed's default."""
OVERLAPPED_BUCKET = 40_000_000
"""The same if reductions overlap with the backward pass, unless one parameter is larger. It is enough to use
the bandwidth of the links, and is Megatron's choice too."""

LIVE_PARAMETERS = 10**9
"""Most gathered parameters that ZeRO 3 keeps for their next use, by DeepSpeed's default: smaller models stay
gathered from the forward pass to the end of the backward pass."""

PREFETCHED_PARAMETERS = 50_000_000
"""Most parameters that ZeRO 3 gathers at a time, by DeepSpeed's default, and copies out of a buffer."""


@dataclass(frozen=True)
class Parameters:
    """Counts of scalars over the whole model (all tensor-parallel ranks together, replicas once)."""

    total: int
    trainable: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, rounded down; activations and logits are estimates.

    ``head_gradient``: gradient of the vocabulary's weights, before it is added to that of earlier
    micro-batches.
    ``copies``: copies of buckets and gathered parameters, and matrices of Muon's step, as far as they do not
    fit into the memory that activations have left.
    ``not_at_once``: at most 0; subtracts the parts of the others that never exist at the same time.
    ``building``: what the full model takes beyond all the rest, before ZeRO 3 divides it.
    ``refactoring``: only at the switch (`switch_costs.py`).
    """

    parameters: int
    gradients: int
    master_weights: int
    moments: int
    initial_factors: int
    activations: int
    gathered_factors: int
    gathered_parameters: int
    bucket: int
    head_gradient: int
    copies: int
    not_at_once: int
    building: int = 0
    refactoring: int = 0

    @property
    def optimizer(self) -> int:
        return self.master_weights + self.moments

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def break_even_rank(config: Config) -> int:
    """Largest rank at which U V in every factorised linear costs no more than the dense linears: the sum of
    OI over that of O + I, rounded down."""
    dense = alike(config, None)
    return sum(each.number * each.entries for each in dense) // sum(
        each.number * sum(each.shape) for each in dense
    )


def parameters(
    config: Config, vocab_size: int, *, ranks: Ranks = None, frozen_base: bool = False
) -> Parameters:
    """Parameters of the model; a tied embedding counts once, an embedding and its own head both.

    Args:
        vocab_size: rows of the embedding that count. With the true vocabulary GPT-2 small has 124,439,808.
        ranks: columns of the factors.
        frozen_base: whether a frozen W0 is kept next to the factors (the first phase).
    """
    h, model, layout = config.model.hidden_size, config.model, qkv_layout(config)
    layer = 0 if factorises_attention(config) else h * (layout.total + layout.rows("q"))
    if not is_llama(config):
        layer += layout.total + model.ffn_hidden_size  # sharded biases
    elif model.add_qkv_bias:
        layer += layout.total
    total = (
        (1 + model.has_own_head) * vocab_size * h + model.num_layers * layer + replicated_parameters(config)
    )
    total += sum(each.number * each.entries for each in alike(config, ranks))
    frozen = dense_entries(config) if ranks is not None and frozen_base else 0
    return Parameters(total=total + frozen, trainable=total)


def flops_per_token(
    config: Config, vocab_size: int, *, ranks: Ranks = None, frozen_base: bool = False
) -> int:
    """Operations of the matrix products of one training token, forward and backward (a multiply-add is two).

    Dense linear 6 O I; factors 6 k (O + I); a frozen W0 next to them 4 O I more, as it needs no weight
    gradient; attention scores and values 12 S a d a layer, not halved for the causal mask; logits 6 h V.
    Recomputation, norms and element-wise work do not count. Arguments as in `parameters`; with the padded
    `vocab_size` it is what the devices do.
    """
    h, model, layout = config.model.hidden_size, config.model, qkv_layout(config)
    queries = layout.rows("q")
    attention = 0 if factorises_attention(config) else 6 * h * (layout.total + queries)
    flops = 6 * h * vocab_size + model.num_layers * (attention + 12 * model.seq_length * queries)
    for each in alike(config, ranks):
        flops += each.number * linear_flops_per_token(each.shape, each.columns, frozen_base=frozen_base)
    return flops


def linear_flops_per_token(shape: tuple[int, int], columns: int | None, *, frozen_base: bool = False) -> int:
    """Operations of one linear of ``shape`` (O, I), forward and backward; ``columns`` None: dense."""
    out, inp = shape
    if columns is None:
        return 6 * out * inp
    return 6 * columns * (out + inp) + (4 * out * inp if frozen_base else 0)


def overlaps_reductions(config: Config, device: str) -> bool:
    """Whether gradients are reduced during the backward pass, unless the user says otherwise.

    Not on a CPU, whose collectives have its cores to themselves. Not with offload under stages 1 and 2: there
    the host waits for each reduced gradient, so that the backward pass would wait all the same.

    Args:
        device: its type or its name; ``cpu``, or any other.
    """
    stage, offload = config.parallel.zero_stage, config.parallel.offload_optimizer
    return device != "cpu" and stage > 0 and not (offload and stage < 3)


def zero_stage_in_use(config: Config, replicas: int) -> int:
    """The stage that DeepSpeed is asked for. Stage 1 has nothing to shard over one replica and in FP32 no
    master weights to keep: all that it would do is copy each gradient twice and each parameter once.
    """
    parallel = config.parallel
    shards = replicas > 1 or parallel.offload_optimizer or precision(config) != "fp32"
    return parallel.zero_stage if shards or parallel.zero_stage > 1 else 0


def reduction_bucket(trained: int, largest: int, *, overlapping: bool) -> int:
    """Entries of one bucket of gradients, of which DeepSpeed allocates all, however small the model is.

    Args:
        trained, largest: entries of all trained parameters on a device, and of the largest. That one has to
            fit where reductions overlap: DeepSpeed frees a larger gradient while it is being reduced.
    """
    return min(trained, max(OVERLAPPED_BUCKET, largest) if overlapping else LARGEST_BUCKET)


def memory_per_device(
    config: Config,
    topology: Topology,
    *,
    ranks: Ranks = None,
    frozen_base: bool = False,
    device: str = "cpu",
    used: Ranks = None,
) -> Memory:
    """Memory of one device: tensor-parallel shards, sharded over the data-parallel ranks as the ZeRO stage
    says. ``used``: columns in use [all of ``ranks``].

    Parameters have 4 bytes (2 in half precision), gradients 4, the FP32 master weights 4 and each moment of
    the optimizer 4, none of these on the device if they are offloaded. Without ZeRO an FP32 parameter is its
    own master. A method may keep the factors' initial values in FP32. Gradients are reduced in buckets
    (`reduction_bucket`; none without ZeRO on one replica), in half precision but for ZeRO 1; where that
    overlaps with the backward pass stages 1 and 2 have two and a copy of the one being reduced. ZeRO 3 keeps
    what it gathers up to `LIVE_PARAMETERS`. Activations and gathered factors: `activation_costs.py`. Not all
    of it is alive at the same time (`_peak`).
    """
    n, dp = topology.tensor_model_parallel_size, topology.data_parallel_size
    size = 4 if precision(config) == "fp32" else 2
    stage = zero_stage_in_use(config, dp)
    sharded, trained = parameters_of_a_rank(config, topology, ranks=ranks, frozen_base=frozen_base)
    linears = alike(config, ranks)
    factors = 0 if ranks is None else sum(each.number * each.entries for each in linears)
    tracked = frozen_base and METHODS[config.training.method].keeps_initial_factors(config)
    spared = 4 * orthogonalised_entries(config, ranks) // n  # which have one moment, not two
    vocabulary = topology.padded_vocab_size * config.model.hidden_size
    largest = max(vocabulary, *(each.largest for each in linears))
    states = 0 if config.parallel.offload_optimizer else 1  # on the device
    divided = stage == 3 and dp > 1
    moving = _Moving(
        gradients=trained * 4 // (dp if stage >= 2 else 1),
        activations=activation_bytes(config, topology, ranks, frozen_base=frozen_base, size=size),
        bucket=_bucket_bytes(config, trained, largest // n, device, stage) if stage or dp > 1 else 0,
        head_gradient=vocabulary // n * size,
    )
    gathering = min(sharded, PREFETCHED_PARAMETERS) * size if divided else 0
    in_use = ranks if used is None else used
    stepping = orthogonalisation_bytes(config, topology, ranks, used=in_use, zero_stage=stage)
    if stepping:  # with the gradients of this replica's share
        stepping += states * trained * 4 // (dp if stage else 1)
    together = _peak(moving, config, topology, device, gathering=gathering, stepping=stepping)
    beyond = together - sum(vars(moving).values())
    memory = Memory(
        **vars(moving),
        copies=max(0, beyond),
        not_at_once=min(0, beyond),
        parameters=sharded * size // (dp if stage == 3 else 1),
        master_weights=states * trained * 4 * _has_master(config, stage) // (dp if stage else 1),
        moments=states * (trained * 4 * moments_of_a_parameter(config) - spared) // (dp if stage else 1),
        initial_factors=factors * 4 // n if tracked else 0,
        gathered_factors=gathered_factor_bytes(config, topology, ranks, size=size),
        gathered_parameters=min(sharded, LIVE_PARAMETERS) * size if divided else 0,
    )
    return replace(memory, building=max(0, size * sharded - memory.total))


def _bucket_bytes(config: Config, trained: int, largest: int, device: str, stage: int) -> int:
    """Of the buckets of gradients, and of the copy of one where reductions overlap."""
    overlapping = overlaps_reductions(config, device)
    in_fp32 = precision(config) == "fp32" or (stage == 1 and not keeps_whole_gradients(config, device, stage))
    entries = reduction_bucket(trained, largest, overlapping=overlapping)
    return entries * (4 if in_fp32 else 2) * (3 if overlapping and stage < 3 else 1)


def parameters_of_a_rank(
    config: Config, topology: Topology, *, ranks: Ranks = None, frozen_base: bool = False
) -> tuple[int, int]:
    """Those of one tensor-parallel rank, all and the trained ones, before ZeRO divides anything. Arguments as
    in `parameters`, with the padded vocabulary."""
    count = parameters(config, topology.padded_vocab_size, ranks=ranks, frozen_base=frozen_base)
    replicated, n = replicated_parameters(config), topology.tensor_model_parallel_size
    total, trained = ((number - replicated) // n + replicated for number in (count.total, count.trainable))
    return total, trained


@dataclass(frozen=True)
class _Moving:
    """The part of `Memory` that comes and goes within a step."""

    gradients: int
    activations: int
    bucket: int
    head_gradient: int


def _peak(
    memory: _Moving, config: Config, topology: Topology, device: str, *, gathering: int, stepping: int
) -> int:
    """Bytes of ``memory`` that are alive together at most: at the end of the last forward pass, when its
    backward pass has the head's gradient, after that, when gradients are reduced, or in the optimizer's step.

    Gradients of earlier micro-batches are there all the time, FP32 ones that are whole and those of ZeRO 3
    from the first on.
    The bucket is allocated after the head's gradient, under ZeRO 1 in the first micro-batch, under ZeRO 3
    once for all; without ZeRO after the backward pass. In half precision the FP32 logits are gone when
    the head's gradient is there, later all.

    Args:
        gathering: bytes of the buffers in which ZeRO 3 gathers parameters, when nothing else is there yet.
        stepping: bytes of the optimizer's step, its gradients included; 0 where it needs nothing else.
    """
    stage = zero_stage_in_use(config, topology.data_parallel_size)
    whole = keeps_whole_gradients(config, device, stage)
    accumulates, half = topology.accumulation_steps > 1, precision(config) != "fp32"
    copies = stage in (1, 2) and not overlaps_reductions(config, device)
    tokens = config.training.micro_batch_size * config.model.seq_length
    logits = 0  # under recomputation they are gone when the layers' activations are there
    if config.training.recompute_granularity is None:
        logits = tokens * topology.padded_vocab_size // topology.tensor_model_parallel_size
    earlier = memory.gradients if accumulates or whole or stage == 3 else 0
    always = memory.activations + earlier
    before = memory.bucket if stage == 3 or (stage == 1 and accumulates) else 0
    return max(
        always + before,
        always + before + memory.head_gradient - 4 * half * logits,
        always + (memory.bucket if stage else 0) + memory.head_gradient - (4 + 2 * half) * logits,
        memory.gradients + memory.bucket,
        earlier + before + gathering,
        stepping and stepping + (memory.bucket if stage == 3 else 0),
        _reducing(memory, stage, accumulates, half=half, whole=whole) if copies else 0,
    )


def _reducing(memory: _Moving, stage: int, accumulates: bool, *, half: bool, whole: bool) -> int:
    """Bytes alive together when stages 1 and 2 reduce a bucket after the backward pass, and copy it for that.

    Under stage 1 in FP32 the end of the backward pass takes more: the vocabulary's weights have a gradient as
    embedding, one as head, and their sum.
    """
    if stage == 1 and not half:
        others = memory.gradients - (0 if accumulates else memory.head_gradient)
        return memory.bucket + others + 3 * memory.head_gradient
    return (memory.gradients if half or accumulates else 0) + (4 if whole else 2) * memory.bucket


def keeps_whole_gradients(config: Config, device: str, stage: int) -> bool:
    """Whether DeepSpeed has FP32 gradients of all parameters, and its bucket in half precision: its optimizer
    for BF16 without a GPU under stage 1.
    """
    return device == "cpu" and precision(config) == "bf16" and stage == 1


def tensor_parallel_bytes(config: Config, topology: Topology) -> int:
    """Bytes of activations that a rank sends per step in tensor parallelism, dense or in the first phase.

    Attention and MLP of each layer send 4 q T h elements per micro-batch of T tokens: an all-gather and a
    reduce-scatter, forward and backward, with q = (n - 1) / n. The second phase sends less, 4 q T r. Where
    several ranks share a key (g < n) they also gather what `shared_features` says, and send its gradient
    back.
    """
    n, model = topology.tensor_model_parallel_size, config.model
    features = 8 * model.hidden_size + 2 * shared_features(config, n)
    elements = topology.micro_batch_size * model.seq_length * features * (n - 1) // n
    size = 4 if precision(config) == "fp32" else 2
    return model.num_layers * topology.accumulation_steps * elements * size


def precision(config: Config) -> str:
    """What the run computes in: ``fp32``, ``bf16`` or ``fp16``."""
    return "bf16" if config.training.bf16 else "fp16" if config.training.fp16 else "fp32"


def _has_master(config: Config, stage: int) -> bool:
    """Whether parameters have FP32 master weights: without ZeRO an FP32 parameter is its own."""
    return stage > 0 or precision(config) != "fp32"


def moments_of_a_parameter(config: Config) -> int:
    """Of the optimizer, for one parameter."""
    return bool(config.optimizer.sgd_momentum) if config.optimizer.optimizer == "sgd" else 2


def dense_entries(config: Config) -> int:
    """Of all linears that methods factorise, dense."""
    return sum(each.number * each.entries for each in alike(config, None))


def replicated_parameters(config: Config) -> int:
    """Unsharded parameters of a tensor-parallel rank: positions, norms, biases of row-parallel linears."""
    model = config.model
    if is_llama(config):
        of_heads = 2 * model.head_size if model.qk_layernorm else 0
        return model.hidden_size + model.num_layers * (2 * model.hidden_size + of_heads)
    return model.hidden_size * (model.max_position_embeddings + 2 + model.num_layers * 6)
