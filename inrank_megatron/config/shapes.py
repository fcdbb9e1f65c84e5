"""The linears of a run's model that methods factorise, and their shapes.

Letters: h hidden_size, f ffn_hidden_size, O x I the shape of a linear.
"""

from inrank_megatron.config.schema import Config

QKV = ("q", "k", "v")


def linear_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """(O, I) of the linears that methods factorise, by module name: both of every MLP (paper, section 6) and,
    with `factorised_linears: mlp-attention`, QKV and the output projection of every attention. QKV is one
    matrix or, with `qkv_factors: separate`, three. SwiGLU's first linear has gate and up below one another.
    """
    h, f = config.model.hidden_size, config.model.ffn_hidden_size
    shapes = {"mlp.linear_fc1": (2 * f if is_llama(config) else f, h), "mlp.linear_fc2": (h, f)}
    if factorises_attention(config):
        qkv = {"self_attention.linear_qkv": (3 * h, h)}
        if config.inrank.qkv_factors == "separate":
            qkv = {f"self_attention.linear_qkv.{part}": (h, h) for part in QKV}
        shapes = {**qkv, "self_attention.linear_proj": (h, h), **shapes}
    layers = range(config.model.num_layers)
    return {f"decoder.layers.{i}.{name}": shape for i in layers for name, shape in shapes.items()}


def smallest_dim(config: Config) -> int:
    """The smallest dimension of the MLP linears, the largest rank they can have."""
    return min(config.model.hidden_size, config.model.ffn_hidden_size)


def is_llama(config: Config) -> bool:
    """RMSNorm, SwiGLU, RoPE, a head of its own, no biases; else GPT-2."""
    return config.model.model_type == "llama"


def factorises_attention(config: Config) -> bool:
    return config.inrank.factorised_linears == "mlp-attention"
