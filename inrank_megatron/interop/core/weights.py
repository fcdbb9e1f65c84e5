"""A model's weights by the names of a run's model, whatever files they are in; all conversions use this.

Letters: h hidden_size, f ffn_hidden_size, O x I the shape of a linear, k columns in use of its factors U
[O, k] and V [k, I].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from inrank_megatron.checkpoint.accounting import differences
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import QKV, has_separate_qkv, is_llama, qkv_layout
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.layers.spec import FactorSpec

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Weights:
    """One model, its tensors read one by one.

    Args:
        origin: what to call it in messages, a path.
        config: sizes and architecture are those of the model; ``qkv_factors`` says whether query, key and
            value are one matrix (rows in Megatron's order, group by group) or three.
        vocab_size: rows of the embedding, without padding.
        factors: the factorised linears; of ``columns`` those in use (``active``) are stored. Only those of a
            run may be ``tracked``: their ``U0`` and ``V0`` can be read too.
        read: the full tensor of a name in :attr:`shapes`, on the CPU, in the precision of its file.
        step: optimizer steps that made the weights; 0 where that is not known.
        tokenizer: a folder with tokenizer files, if there is one.
        notes: messages for the user.
    """

    origin: str
    config: Config
    vocab_size: int
    factors: Mapping[str, FactorSpec]
    read: Callable[[str], Tensor]
    step: int = 0
    tokenizer: Path | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def shapes(self) -> Shapes:
        """Shape of every tensor, in the order of the model: the names that :attr:`read` takes."""
        return weight_shapes(self.config, self.vocab_size, self.factors)


def weight_shapes(config: Config, vocab_size: int, factors: Mapping[str, FactorSpec]) -> Shapes:
    """Name and full shape of every weight of a run's model: no moments, no initial values of factors."""
    model, llama, layout = config.model, is_llama(config), qkv_layout(config)
    h, f = model.hidden_size, model.ffn_hidden_size
    shapes: Shapes = {"embedding.word_embeddings.weight": (vocab_size, h)}
    if not llama:
        shapes["embedding.position_embeddings.weight"] = (model.max_position_embeddings, h)
    norm = {"weight": (h,)} if llama else {"weight": (h,), "bias": (h,)}
    blocks: dict[str, tuple[int, int] | None] = {
        "input_layernorm": None,
        **_qkv(config),
        "self_attention.linear_proj": (h, layout.rows("q")),
        "pre_mlp_layernorm": None,
        "mlp.linear_fc1": (2 * f if llama else f, h),
        "mlp.linear_fc2": (h, f),
    }
    for index in range(model.num_layers):
        for name, shape in blocks.items():
            module = f"decoder.layers.{index}.{name}"
            biased = not llama or (model.add_qkv_bias and ".linear_qkv" in name)
            leaves = norm if shape is None else _linear(shape, factors.get(module), bias=biased)
            shapes |= {f"{module}.{leaf}": leaf_shape for leaf, leaf_shape in leaves.items()}
        if model.qk_layernorm:
            attention = f"decoder.layers.{index}.self_attention"
            shapes |= {f"{attention}.{part}_layernorm.weight": (model.head_size,) for part in "qk"}
    shapes |= {f"decoder.final_layernorm.{leaf}": leaf_shape for leaf, leaf_shape in norm.items()}
    if model.has_own_head:
        shapes["output_layer.weight"] = (vocab_size, h)
    return shapes


def _qkv(config: Config) -> dict[str, tuple[int, int]]:
    h, layout, name = config.model.hidden_size, qkv_layout(config), "self_attention.linear_qkv"
    if has_separate_qkv(config):
        return {f"{name}.{part}": (layout.rows(part), h) for part in QKV}
    return {name: (layout.total, h)}


def _linear(shape: tuple[int, int], spec: FactorSpec | None, *, bias: bool) -> Shapes:
    out, inp = shape
    leaves: Shapes = (
        {} if spec is None else {"U": (out, spec.active_columns), "V": (spec.active_columns, inp)}
    )
    if spec is None or spec.frozen_base:
        leaves["weight"] = shape
    return leaves | ({"bias": (out,)} if bias else {})


def check_layers(origin: str, config: Config, *, tensors: int) -> None:
    """Before names are made of each layer: no model has more layers than tensors.

    Raises:
        UserError: it has, so its files and its configuration do not belong together.
    """
    if config.model.num_layers > tensors:
        raise UserError(
            f"{origin}: num_layers = {config.model.num_layers}, and its files hold {tensors} tensors; name a "
            "complete checkpoint"
        )


def account(
    origin: str, *, there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]
) -> None:
    """Every tensor of a file has its place in the model, and the model lacks none.

    Args:
        there: name and shape of each tensor in the files of ``origin``. here: of each that the model has.

    Raises:
        UserError: it names the first tensors that differ, with both shapes.
    """
    here, there = ({name: tuple(shape) for name, shape in shapes.items()} for shapes in (here, there))
    if differing := differences(there, here, expected="expected"):
        raise UserError(
            f"{origin}: tensors that differ from those of its model: {differing}; its files and its "
            "configuration do not belong together: name a complete checkpoint"
        )


def training_method(factors: Mapping[str, FactorSpec]) -> str:
    """The method that trains such a model on without changing its structure."""
    if not factors:
        return "dense"
    return "lora" if any(spec.frozen_base for spec in factors.values()) else "fixed-rank"
