"""The linears of a run's model that methods factorise, and their shapes.

Letters: h hidden_size, f ffn_hidden_size, a heads, g groups of heads that share key and value, d features of
a head, O x I the shape of a linear.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from inrank_megatron.config.schema import Config

if TYPE_CHECKING:
    from torch import Tensor

QKV = ("q", "k", "v")

Ranks = int | Mapping[str, int] | None
"""Columns of the linears' factors: one number, of which a narrow linear has no more than it has features, or
one by module name; None: dense linears.
"""


@dataclass(frozen=True)
class QKVLayout:
    """How Megatron orders the output features of a fused QKV: for every group its queries, a key, a value.

    Args:
        groups: g. queries: heads of a group, a / g. size: d.
    """

    groups: int
    queries: int
    size: int

    def rows(self, part: str) -> int:
        """Output features of query (a d), key or value (g d each)."""
        return self.groups * (self.queries if part == "q" else 1) * self.size

    @property
    def total(self) -> int:
        """Output features of all three, (a + 2 g) d."""
        return sum(map(self.rows, QKV))

    def view(self, fused: "Tensor", part: str) -> "Tensor":
        """The rows of query, key or value in a full fused tensor [(a + 2 g) d, ...], as a view [g, heads, d,
        ...].
        """
        first = {"q": 0, "k": self.queries, "v": self.queries + 1}[part]
        heads = slice(first, self.queries if part == "q" else first + 1)
        return fused.unflatten(0, (self.groups, self.queries + 2, self.size))[:, heads]


def qkv_layout(config: Config) -> QKVLayout:
    """That of the run's attention."""
    model = config.model
    queries = model.num_attention_heads // model.query_groups
    return QKVLayout(groups=model.query_groups, queries=queries, size=model.head_size)


def linear_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """(O, I) of the linears that methods factorise, by module name: both of every MLP (paper, section 6) and,
    with `factorised_linears: mlp-attention`, QKV and the output projection of every attention. QKV is one
    matrix or, with `qkv_factors: separate`, three. SwiGLU's first linear has gate and up below one another.
    """
    layer = _shapes_of_a_layer(config)
    return {
        f"decoder.layers.{i}.{name}": shape
        for i in range(config.model.num_layers)
        for name, shape in layer.items()
    }


class Alike(NamedTuple):
    """``number`` linears of one shape (O, I), with as many ``columns`` in their factors (None: dense)."""

    shape: tuple[int, int]
    columns: int | None
    row_parallel: bool
    number: int

    @property
    def entries(self) -> int:
        """Of one linear's factors, or of its dense matrix."""
        out, inp = self.shape
        return out * inp if self.columns is None else self.columns * (out + inp)

    @property
    def largest(self) -> int:
        """Entries of one linear's larger factor, or of its dense matrix."""
        return max(self.shape) * (min(self.shape) if self.columns is None else self.columns)


def alike(config: Config, ranks: Ranks) -> list[Alike]:
    """The linears of `linear_shapes` with factors of so many columns, those that are alike together: costs of
    a model do not take longer to compute the more layers it has.
    """
    numbers: Counter[tuple[tuple[int, int], int | None, bool]] = Counter()
    if isinstance(ranks, Mapping):
        for name, shape in linear_shapes(config).items():
            numbers[shape, ranks[name], _is_row_parallel(name)] += 1
    else:
        for name, shape in _shapes_of_a_layer(config).items():
            columns = None if ranks is None else min(ranks, *shape)
            numbers[shape, columns, _is_row_parallel(name)] += config.model.num_layers
    return [Alike(*key, number) for key, number in numbers.items()]


def number_of_linears(config: Config) -> int:
    """How many methods factorise."""
    return len(_shapes_of_a_layer(config)) * config.model.num_layers


def all_columns(config: Config, ranks: Ranks) -> int:
    """Of the factors of all linears together; 0 for dense ones."""
    return sum(each.number * (each.columns or 0) for each in alike(config, ranks))


def _shapes_of_a_layer(config: Config) -> dict[str, tuple[int, int]]:
    h, f, layout = config.model.hidden_size, config.model.ffn_hidden_size, qkv_layout(config)
    shapes = {"mlp.linear_fc1": (2 * f if is_llama(config) else f, h), "mlp.linear_fc2": (h, f)}
    if factorises_attention(config):
        qkv = {"self_attention.linear_qkv": (layout.total, h)}
        if has_separate_qkv(config):
            qkv = {f"self_attention.linear_qkv.{part}": (layout.rows(part), h) for part in QKV}
        shapes = {**qkv, "self_attention.linear_proj": (h, layout.rows("q")), **shapes}
    return shapes


def _is_row_parallel(name: str) -> bool:
    return "linear_fc2" in name or "linear_proj" in name


def smallest_dim(config: Config) -> int:
    """The smallest dimension of the MLP linears, the largest rank they can have."""
    return min(config.model.hidden_size, config.model.ffn_hidden_size)


def is_llama(config: Config) -> bool:
    """RMSNorm, SwiGLU, RoPE; else GPT-2."""
    return config.model.model_type == "llama"


def factorises_attention(config: Config) -> bool:
    return config.inrank.factorised_linears == "mlp-attention"


def has_separate_qkv(config: Config) -> bool:
    """Whether the run's query, key and value are three modules."""
    return factorises_attention(config) and config.inrank.qkv_factors == "separate"
