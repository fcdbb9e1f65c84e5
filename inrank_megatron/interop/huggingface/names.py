"""Where each tensor of Hugging Face's GPT-2 and LLaMA is in a run's model: names, rows and orientation.

``GPT2LMHeadModel`` keeps its linears as [in, out], and query, key and value as one with q, k and v one after
the other; the LLaMA family has three, and SwiGLU's gate and up apart. A run has the rows of a fused QKV
group by group (``QKVLayout``), and gate above up. What holds for the rows of a matrix holds for its bias and
for the rows of its factor U; V has no rows of the output, so all pieces of one linear share it.

Letters: h hidden_size, f ffn_hidden_size, O x I the shape of a linear.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import QKV, QKVLayout, has_separate_qkv, is_llama, qkv_layout

HALVES = ("gate", "up")


@dataclass(frozen=True)
class Piece:
    """Some rows of a run's tensors.

    Args:
        source: the run's module, such as ``decoder.layers.0.mlp.linear_fc1``.
        rows: "" all as they are; "qkv" all, from head by head to q, k, v; or those of "q", "k", "v", "gate",
            "up".
    """

    source: str
    rows: str = ""


@dataclass(frozen=True)
class HFModule:
    """One module of a Hugging Face model.

    Args:
        name: its name there, such as ``transformer.h.0.attn.c_attn``.
        pieces: what its output features are, from top to bottom.
        leaves: of ``weight`` and ``bias`` those that it has.
        transposed: its weight is stored as [in, out].
    """

    name: str
    pieces: tuple[Piece, ...]
    leaves: tuple[str, ...] = ("weight",)
    transposed: bool = False


def hf_modules(config: Config) -> dict[str, HFModule]:
    """All modules with weights of the Hugging Face model that a run's model is, by name, in its order.

    A head that is the embedding is not listed.
    """
    layers = range(config.model.num_layers)
    modules = _llama(config, layers) if is_llama(config) else _gpt2(config, layers)
    return {module.name: module for module in modules}


def _gpt2(config: Config, layers: range) -> Iterable[HFModule]:
    both = ("weight", "bias")
    yield HFModule("transformer.wte", (Piece("embedding.word_embeddings"),))
    yield HFModule("transformer.wpe", (Piece("embedding.position_embeddings"),))
    for index in layers:
        here, there = f"decoder.layers.{index}", f"transformer.h.{index}"
        qkv = f"{here}.self_attention.linear_qkv"
        parts = tuple(Piece(f"{qkv}.{part}") for part in QKV)
        attention = parts if has_separate_qkv(config) else (Piece(qkv, "qkv"),)
        yield HFModule(f"{there}.ln_1", (Piece(f"{here}.input_layernorm"),), both)
        yield HFModule(f"{there}.attn.c_attn", attention, both, transposed=True)
        for name, source in (("attn.c_proj", "self_attention.linear_proj"), ("ln_2", "pre_mlp_layernorm"),
                             ("mlp.c_fc", "mlp.linear_fc1"), ("mlp.c_proj", "mlp.linear_fc2")):  # fmt: skip
            yield HFModule(f"{there}.{name}", (Piece(f"{here}.{source}"),), both, transposed=name != "ln_2")
    yield HFModule("transformer.ln_f", (Piece("decoder.final_layernorm"),), both)


def _llama(config: Config, layers: range) -> Iterable[HFModule]:
    yield HFModule("model.embed_tokens", (Piece("embedding.word_embeddings"),))
    for index in layers:
        here, there = f"decoder.layers.{index}", f"model.layers.{index}"
        qkv, fc1 = f"{here}.self_attention.linear_qkv", f"{here}.mlp.linear_fc1"
        for part in QKV:
            piece = Piece(f"{qkv}.{part}") if has_separate_qkv(config) else Piece(qkv, part)
            leaves = ("weight", "bias") if config.model.add_qkv_bias else ("weight",)
            yield HFModule(f"{there}.self_attn.{part}_proj", (piece,), leaves)
        yield HFModule(f"{there}.self_attn.o_proj", (Piece(f"{here}.self_attention.linear_proj"),))
        for part in "qk" if config.model.qk_layernorm else "":
            norm = Piece(f"{here}.self_attention.{part}_layernorm")
            yield HFModule(f"{there}.self_attn.{part}_norm", (norm,))
        for half in HALVES:
            yield HFModule(f"{there}.mlp.{half}_proj", (Piece(fc1, half),))
        for name, source in (("mlp.down_proj", "mlp.linear_fc2"), ("input_layernorm", "input_layernorm"),
                             ("post_attention_layernorm", "pre_mlp_layernorm")):  # fmt: skip
            yield HFModule(f"{there}.{name}", (Piece(f"{here}.{source}"),))
    yield HFModule("model.norm", (Piece("decoder.final_layernorm"),))
    if config.model.has_own_head:
        yield HFModule("lm_head", (Piece("output_layer"),))


def hf_shapes(config: Config, run_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the dense Hugging Face model, by name.

    Args:
        run_shapes: of every tensor of the run's dense model (``weight_shapes`` without factors).

    Raises:
        ValueError: a tensor of the run has no place there.
    """
    shapes, used, layout = {}, set(), qkv_layout(config)
    for module in hf_modules(config).values():
        for leaf in module.leaves:
            sources = [f"{piece.source}.{leaf}" for piece in module.pieces]
            used.update(sources)
            heights = [
                height(run_shapes[source][0], piece.rows, layout=layout)
                for source, piece in zip(sources, module.pieces, strict=True)
            ]
            shape = (sum(heights), *run_shapes[sources[0]][1:])
            shapes[f"{module.name}.{leaf}"] = shape[::-1] if module.transposed else shape
    if homeless := run_shapes.keys() - used:
        raise ValueError(f"no place in the Hugging Face model: {sorted(homeless)}")
    return shapes


def hf_tensor(module: HFModule, leaf: str, read: Callable[[str], Tensor], *, layout: QKVLayout) -> Tensor:
    """The tensor ``leaf`` of ``module`` from full tensors of the run, which ``read`` gives by name."""
    parts = [take(read(f"{piece.source}.{leaf}"), piece.rows, layout=layout) for piece in module.pieces]
    full = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (full.T if module.transposed and leaf == "weight" else full).contiguous()


def feeders(modules: Mapping[str, HFModule]) -> dict[str, list[tuple[HFModule, Piece]]]:
    """Of each module of the run those Hugging Face modules, and which rows, that it is in; the way back."""
    found: dict[str, list[tuple[HFModule, Piece]]] = {}
    for module in modules.values():
        for piece in module.pieces:
            found.setdefault(piece.source, []).append((module, piece))
    return found


def run_tensor(
    name: str,
    shape: tuple[int, ...],
    read: Callable[[str], Tensor],
    *,
    fed_by: Mapping[str, list[tuple[HFModule, Piece]]],
    layout: QKVLayout,
) -> Tensor:
    """The full tensor ``name`` of a run from those of a dense Hugging Face model, which ``read`` gives.

    Args:
        shape: of the run's tensor. fed_by: from :func:`feeders`, of a configuration with one fused QKV.

    Raises:
        KeyError: no tensor there has such a place.
    """
    source, _, leaf = name.rpartition(".")
    full = None
    for module, piece in fed_by[source]:
        stored = read(f"{module.name}.{leaf}")
        values = stored.T if module.transposed and leaf == "weight" else stored
        full = values.new_empty(shape) if full is None else full
        put(full, piece.rows, values, layout=layout)
    return full


def take(full: Tensor, rows: str, *, layout: QKVLayout) -> Tensor:
    """The rows that ``rows`` (see :class:`Piece`) names of a weight [O, I], a factor U [O, k] or bias [O]."""
    return _view(full, rows, layout).reshape(-1, *full.shape[1:])


def put(full: Tensor, rows: str, values: Tensor, *, layout: QKVLayout) -> None:
    """Write ``values``, as :func:`take` would give them, into those rows of ``full``."""
    view = _view(full, rows, layout)
    view.copy_(values.reshape(view.shape))


def _view(full: Tensor, rows: str, layout: QKVLayout) -> Tensor:
    """A view of those rows, with further axes in place of the first."""
    if rows == "":
        return full
    if rows in HALVES:
        return full.unflatten(0, (2, -1))[HALVES.index(rows)]
    if rows == "qkv":  # of GPT-2, whose groups are heads
        return full.unflatten(0, (layout.groups, 3, layout.size)).transpose(0, 1)
    return layout.view(full, rows)


def height(total: int, rows: str, *, layout: QKVLayout) -> int:
    """How many rows of ``total`` those are."""
    return layout.rows(rows) if rows in QKV else total // 2 if rows in HALVES else total
