"""Bytes that a forward pass keeps for the backward pass, by what this project's layers store.

Korthikanti et al. (2022, equation 2 and section 4) without stored attention scores, which no fused attention
keeps, and with the factors' inner activations. Numbers per token and layer; n tensor-parallel size, h
hidden_size, f ffn_hidden_size, q the features of all queries, v those of all keys (and of all values), k
columns of a factorised linear:

- outside the tensor-parallel region, divided by n with the tokens alone (sequence parallelism): 4 h, the
  inputs of both norms and of the linears after them; with hidden dropout a mask of one byte for each of 2 h;
- inside, divided by n: QKV and attention's output, 2 q + 2 v; the activation's input and output, 2 f. LLaMA:
  queries and keys once more after RoPE, q + v, and with QK norm once more after that; and 5 f: gate and up,
  up again, the gate's activation, the product. Where ranks share a key, what they gather, undivided;
- x V^T of each factorised linear, k, on every rank; next to W0 a column-parallel one may keep all tokens of
  its input under sequence parallelism, h instead of h / n.

In addition: input and output of the last norm, 2 h; the logits, divided by n, in FP32, and in half precision
as well. Where n > 1, a step keeps the gathered halves of all factors, h k numbers per linear whatever the
tokens (``gathered_factor_bytes``).
"""

from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import Ranks, alike, all_columns, has_separate_qkv, is_llama, qkv_layout
from inrank_megatron.config.topology import Topology


def activation_bytes(
    config: Config,
    topology: Topology,
    ranks: Ranks,
    *,
    frozen_base: bool,
    size: int,
    backward: bool = True,
) -> int:
    """Bytes on one device for a micro-batch, at their most. With full recomputation each layer keeps its
    input alone, and the backward pass has either the logits or one layer's activations besides.

    Args:
        size: bytes of a number in the run's precision.
        backward: whether a backward pass follows; else there are the logits and their input, or one layer's
            activations.
    """
    h, layers, n = config.model.hidden_size, config.model.num_layers, topology.tensor_model_parallel_size
    tokens = config.model.seq_length * config.training.micro_batch_size
    shards = n if config.parallel.sequence_parallel else 1
    logits = tokens * topology.padded_vocab_size * (4 if size == 4 else 4 + size) // n
    last_norm = tokens * 2 * h * size // shards
    layer = tokens * (_numbers(config, n, shards) * size // n + _masks(config) // shards)
    kept = layers * layer + _of_factors(config, ranks, tokens, shards, frozen_base) * size
    if not backward:
        return max(last_norm + logits, kept // layers)
    if config.training.recompute_granularity == "full":
        return tokens * layers * h * size // shards + last_norm + max(logits, kept // layers)
    return kept + last_norm + logits


def gathered_factor_bytes(config: Config, topology: Topology, ranks: Ranks, *, size: int) -> int:
    """Bytes on one device of the factors that are gathered for a step (``FullFactor``), and of their
    gradients, which are summed in FP32 where micro-batches accumulate: of the full factor under sequence
    parallelism, else of the shard.
    """
    n = topology.tensor_model_parallel_size
    if ranks is None or n == 1:
        return 0
    accumulates = topology.accumulation_steps > 1
    numbers = config.model.hidden_size * all_columns(config, ranks)
    return numbers * size + 4 * accumulates * numbers // (1 if config.parallel.sequence_parallel else n)


def _numbers(config: Config, n: int, sequence_shards: int) -> int:
    """Of a token and dense layer, times n."""
    h, f, layout = config.model.hidden_size, config.model.ffn_hidden_size, qkv_layout(config)
    queries, keys = layout.rows("q"), layout.rows("k")
    inside = layout.total + queries + (5 * f if is_llama(config) else 2 * f)
    inside += (is_llama(config) + config.model.qk_layernorm) * (queries + keys)
    return 4 * h * n // sequence_shards + inside + n * shared_features(config, n)


def shared_features(config: Config, n: int) -> int:
    """Features of a token that ``n`` tensor-parallel ranks gather in each layer because several share a key:
    Megatron gathers all of a fused QKV, separate linears gather keys and values.
    """
    layout = qkv_layout(config)
    if layout.groups >= n:
        return 0
    return 2 * layout.rows("k") if has_separate_qkv(config) else layout.total


def _masks(config: Config) -> int:
    return 2 * config.model.hidden_size if config.model.hidden_dropout else 0


def _of_factors(
    config: Config,
    ranks: Ranks,
    tokens: int,
    sequence_shards: int,
    frozen_base: bool,
) -> int:
    """Numbers that factorised linears keep beyond dense ones, over all layers."""
    if ranks is None:
        return 0
    h = config.model.hidden_size
    column_parallel = sum(each.number for each in alike(config, ranks) if not each.row_parallel)
    inputs = column_parallel * (h - h // sequence_shards) if frozen_base else 0
    return tokens * (all_columns(config, ranks) + inputs)
