"""Parameters, operations and memory of a GPT-2, dense or with factorised MLP linears.

Letters: h hidden_size, f ffn_hidden_size, L layers, S seq_length, V vocabulary, O x I the shape of a
linear, k columns of its factors U [O, k] and V [k, I], n tensor-parallel size.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from inrank_megatron.checks import Topology
from inrank_megatron.config import Config

Ranks = int | Mapping[str, int] | None

# Dense peak operations a second, without sparsity, from the vendors' data sheets; the first match counts.
# BF16 and FP16 are tensor-core rates; FP32 is true FP32, since torch leaves TF32 off unless asked for it.
PEAK_FLOPS = (
    (r"B200", {"bf16": 2.25e15, "fp16": 2.25e15, "fp32": 75e12}),
    (r"H200 NVL|H100 NVL", {"bf16": 835e12, "fp16": 835e12, "fp32": 60e12}),
    (r"H100 PCIe", {"bf16": 756e12, "fp16": 756e12, "fp32": 51e12}),
    (r"GH200|H200|H100", {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}),
    (r"\bA100\b", {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12}),
    (r"L40S", {"bf16": 362e12, "fp16": 362e12, "fp32": 91.6e12}),
    (r"L4\b", {"bf16": 121e12, "fp16": 121e12, "fp32": 30.3e12}),
    (r"A10\b", {"bf16": 125e12, "fp16": 125e12, "fp32": 31.2e12}),
    (r"V100-PCIE", {"fp16": 112e12, "fp32": 14e12}),
    (r"V100", {"fp16": 125e12, "fp32": 15.7e12}),
    (r"\bT4\b", {"fp16": 65e12, "fp32": 8.1e12}),
)


@dataclass(frozen=True)
class Parameters:
    """Counts of scalars over the whole model (all tensor-parallel ranks together, replicas once)."""

    total: int
    trainable: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device under ZeRO stage 1, rounded down; activations and logits are estimates."""

    parameters: int
    gradients: int
    optimizer: int
    initial_factors: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.initial_factors + self.activations


def linear_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """(O, I) of the linears that methods factorise, by module name: both of every MLP (paper, section 6) and,
    with `factorised_linears: mlp-attention`, the fused QKV and the output projection of every attention.
    """
    h, f = config.model.hidden_size, config.model.ffn_hidden_size
    shapes = {"mlp.linear_fc1": (f, h), "mlp.linear_fc2": (h, f)}
    if _factorises_attention(config):
        shapes = {"self_attention.linear_qkv": (3 * h, h), "self_attention.linear_proj": (h, h), **shapes}
    layers = range(config.model.num_layers)
    return {f"decoder.layers.{i}.{name}": shape for i in layers for name, shape in shapes.items()}


def break_even_rank(config: Config) -> int:
    """Largest rank at which U V costs no more than the dense linear: OI / (O + I), rounded down."""
    h, f = config.model.hidden_size, config.model.ffn_hidden_size
    return h * f // (h + f)


def parameters(
    config: Config, vocab_size: int, *, ranks: Ranks = None, frozen_base: bool = False
) -> Parameters:
    """Parameters of the model; the tied embedding counts once.

    Args:
        vocab_size: rows of the embedding that count. With the true vocabulary GPT-2 small has 124,439,808.
        ranks: columns of the factors, one number for all linears or one for each name of `linear_shapes`;
            None: dense linears.
        frozen_base: whether a frozen W0 stands beside the factors (the first phase).
    """
    h, model = config.model.hidden_size, config.model
    columns = _columns(config, ranks)
    attention = 0 if _factorises_attention(config) else 4 * h * h
    norms_and_attention = 4 * h + attention + 4 * h
    biases = model.ffn_hidden_size + h
    total = vocab_size * h + model.max_position_embeddings * h + 2 * h
    total += model.num_layers * (norms_and_attention + biases)
    frozen = 0
    for name, (out, inp) in linear_shapes(config).items():
        total += out * inp if columns is None else columns[name] * (out + inp)
        frozen += out * inp if columns is not None and frozen_base else 0
    return Parameters(total=total + frozen, trainable=total)


def flops_per_token(
    config: Config, vocab_size: int, *, ranks: Ranks = None, frozen_base: bool = False
) -> int:
    """Operations of the matrix products of one training token, forward and backward (a multiply-add is two).

    Dense linear 6 O I; factors 6 k (O + I); a frozen W0 beside them 4 O I more, as it needs no weight
    gradient; attention scores and values 12 S h a layer, not halved for the causal mask; logits 6 h V.
    Recomputation, norms and element-wise work do not count. Arguments as in `parameters`; with the padded
    `vocab_size` it is what the devices do.
    """
    h, model = config.model.hidden_size, config.model
    columns = _columns(config, ranks)
    attention = 0 if _factorises_attention(config) else 6 * 4 * h * h
    flops = 6 * h * vocab_size + model.num_layers * (attention + 12 * model.seq_length * h)
    for name, (out, inp) in linear_shapes(config).items():
        if columns is None:
            flops += 6 * out * inp
        else:
            flops += 6 * columns[name] * (out + inp) + (4 * out * inp if frozen_base else 0)
    return flops


def memory_per_device(
    config: Config, topology: Topology, *, ranks: Ranks = None, frozen_base: bool = False
) -> Memory:
    """Memory of one device: tensor-parallel shards, optimizer states cut over the data-parallel ranks.

    Parameters have 4 bytes (2 in BF16), gradients 4, the FP32 masters and both Adam moments 12. Criterion
    `update` keeps the factors' initial values in FP32. Activations follow Korthikanti et al. (2022, section
    4) without dropout masks and stored attention scores: 16 h numbers a token and layer where f = 4 h.
    """
    n, dp = topology.tensor_model_parallel_size, topology.data_parallel_size
    size = 2 if config.training.bf16 else 4
    count = parameters(config, topology.padded_vocab_size, ranks=ranks, frozen_base=frozen_base)
    whole = _replicated(config)
    share, trained = ((number - whole) // n + whole for number in (count.total, count.trainable))
    columns = _columns(config, ranks)
    shapes = linear_shapes(config)
    factors = sum(columns[name] * sum(shape) for name, shape in shapes.items()) if columns else 0
    copies = (
        frozen_base
        and config.training.method.startswith("inrank")
        and (config.inrank.rank_criterion == "update")
    )
    return Memory(
        parameters=share * size,
        gradients=trained * 4,
        optimizer=trained * 12 // dp,
        initial_factors=factors * 4 // n if copies else 0,
        activations=_activations(config, topology, sum(columns.values()) if columns else 0),
    )


def device_peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak dense operations a second of a GPU in `dtype` ("bf16", "fp16", "fp32").

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.

    Returns:
        None where the device (a CPU, say) or its rate is not known.
    """
    for pattern, peaks in PEAK_FLOPS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return peaks.get(dtype)
    return None


def _factorises_attention(config: Config) -> bool:
    return config.inrank.factorised_linears == "mlp-attention"


def _columns(config: Config, ranks: Ranks) -> Mapping[str, int] | None:
    return dict.fromkeys(linear_shapes(config), ranks) if isinstance(ranks, int) else ranks


def _replicated(config: Config) -> int:
    """Parameters whole on every tensor-parallel rank: positions, norms, biases of row-parallel linears."""
    model = config.model
    return model.hidden_size * (model.max_position_embeddings + 2 + model.num_layers * 6)


def _activations(config: Config, topology: Topology, columns: int) -> int:
    model, n = config.model, topology.tensor_model_parallel_size
    tokens, size = model.seq_length * config.training.micro_batch_size, 2 if config.training.bf16 else 4
    shared = 1 if config.parallel.sequence_parallel else n
    # The norms' and the blocks' inputs lie outside the tensor-parallel region: cut only with the tokens.
    outside, inside = 4 * model.hidden_size, 4 * model.hidden_size + 2 * model.ffn_hidden_size
    layers = model.num_layers * (outside * shared + inside) // n
    logits = topology.padded_vocab_size * (size + 4) // n
    return tokens * ((layers + columns) * size + logits)
