"""Factorised models for transformers: those of ``modeling_inrank.py``, as small as the run's."""

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import QKVLayout, has_separate_qkv, qkv_layout
from inrank_megatron.data.cache import read_json
from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.gpt import Forward
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.tokenizer_files import has_tokenizer
from inrank_megatron.interop.core.weights import Shapes, Weights, account, check_layers, weight_shapes
from inrank_megatron.interop.huggingface.config import hf_settings, run_config
from inrank_megatron.interop.huggingface.dense import dense_config, dense_tensors
from inrank_megatron.interop.huggingface.files import SafetensorsFolder, write_tensors
from inrank_megatron.interop.huggingface.kinds import CLASSES, CONFIG, FACTORISED, kind_of, model_type
from inrank_megatron.interop.huggingface.model import auto_forward, quiet_transformers, write_settings
from inrank_megatron.interop.huggingface.names import put, take
from inrank_megatron.interop.huggingface.places import Place, factorisable, placed_shapes, places
from inrank_megatron.lowrank.layers.spec import FactorSpec

NAME = "hf-factorised"


def matches(path: Path) -> bool:
    """Whether ``path`` is a folder with a factorised model."""
    return model_type(path) in FACTORISED


def open_weights(path: Path, options: Options) -> Weights:
    """The weights, with the settings of a run that trains them on.

    Raises:
        UserError: the settings are none that a run can have, or tensors are missing, too many or of other
            shapes.
    """
    values = _values(path)
    config, vocab_size, notes = _settings(path)
    stored = SafetensorsFolder(path)
    check_layers(str(path), config, tensors=len(stored.shapes))
    factors = _specs(path, config, values["factors"], values.get("buffers") or {})
    run_shapes = weight_shapes(config, vocab_size, factors)
    there = places(config, factors)
    account(str(path), there=stored.shapes, here=placed_shapes(there, run_shapes, layout=qkv_layout(config)))
    back: dict[str, list[tuple[str, Place]]] = {}
    for name, place in there.items():
        back.setdefault(place.source, []).append((name, place))

    def read(name: str) -> Tensor:
        return _assembled(run_shapes[name], back[name], stored, layout=qkv_layout(config))

    tokenizer = path if has_tokenizer(path) else None
    return Weights(str(path), config, vocab_size, factors, read, tokenizer=tokenizer, notes=notes)


def model_of(path: Path) -> tuple[Config, Path | None]:
    """The settings of a run with the model, and the folder with its tokenizer, if it has one; no weights are
    read. UserError as for :func:`open_weights`.
    """
    return _settings(path)[0], path if has_tokenizer(path) else None


def forward(path: Path, options: Options) -> Forward:
    """Logits of the model that transformers builds."""
    return auto_forward(path)


def write(weights: Weights, folder: Path, options: Options) -> None:
    """Factors as factors, in FP32, and the code of the model, for machines without this project.

    Raises:
        UserError: the model has no factors.
    """
    from inrank_megatron.interop.huggingface import modeling_inrank

    if not weights.factors:
        raise UserError(f"{weights.origin}: has no factorised linear; give --format hf-dense")
    write_tensors(folder, *_factorised_tensors(weights))
    config, model, code = _config(weights), _class_of(weights), Path(modeling_inrank.__file__)
    config.architectures = [model.__name__]
    config.auto_map = {
        "AutoConfig": f"{code.stem}.{type(config).__name__}",
        "AutoModel": f"{code.stem}.{model.base_class.__name__}",
        "AutoModelForCausalLM": f"{code.stem}.{model.__name__}",
    }
    write_settings(weights, config, folder)
    shutil.copyfile(code, folder / code.name)


def in_memory(weights: Weights):
    """The ``PreTrainedModel`` with these weights, FP32, in evaluation mode, on the CPU; no files.

    Factorised where they are, transformers' own model where they are not at all.
    """
    shapes, tensor = _factorised_tensors(weights) if weights.factors else dense_tensors(weights)
    config = _config(weights) if weights.factors else dense_config(weights)
    with quiet_transformers():
        model, loading = _class_of(weights).from_pretrained(
            None,
            config=config,
            state_dict={name: tensor(name).float() for name in shapes},
            output_loading_info=True,
        )
    if faults := {name: keys for name, keys in loading.items() if keys}:
        raise ValueError(f"the model and the map of its names differ: {faults}")
    return model.eval()


def _factorised_tensors(weights: Weights) -> tuple[Shapes, Callable[[str], Tensor]]:
    there, layout = places(weights.config, weights.factors), qkv_layout(weights.config)

    def tensor(name: str) -> Tensor:
        place = there[name]
        rows = take(weights.read(place.source), place.rows, layout=layout)
        return (rows.T if place.transposed else rows).contiguous()

    return placed_shapes(there, weights.shapes, layout=layout), tensor


def _assembled(
    shape: tuple[int, ...], parts: list[tuple[str, Place]], stored: SafetensorsFolder, *, layout: QKVLayout
) -> Tensor:
    """The run's tensor from the rows of it that lie in several places."""
    full = None
    for name, place in parts:
        values = stored.read(name)
        full = values.new_empty(shape) if full is None else full
        put(full, place.rows, values.T if place.transposed else values, layout=layout)
    return full


def _config(weights: Weights):
    from inrank_megatron.interop.huggingface import modeling_inrank

    kind = getattr(modeling_inrank, f"InRank{CLASSES[kind_of(weights.config)][0]}")
    specs = {name: weights.factors.get(source) for name, source in factorisable(weights.config).items()}
    return kind(
        **hf_settings(weights),
        factors={
            name: {"rank": spec.active_columns, "base": spec.frozen_base}
            for name, spec in specs.items()
            if spec
        },
        buffers={
            n: spec.active_columns - spec.rank
            for n, spec in specs.items()
            if spec and spec.active_columns > spec.rank
        },
        separate_qkv=has_separate_qkv(weights.config),
    )


def _class_of(weights: Weights):
    import transformers

    from inrank_megatron.interop.huggingface import modeling_inrank

    name = CLASSES[kind_of(weights.config)][1]
    return getattr(modeling_inrank, f"InRank{name}") if weights.factors else getattr(transformers, name)


def _values(path: Path) -> dict:
    """``config.json``, with ``factors`` and ``buffers`` checked as far as that is possible without the
    tensors.
    """
    values = read_json(path / CONFIG) or {}
    factors = values.get("factors")
    entries = factors.values() if isinstance(factors, dict) else [None]
    for entry in entries:
        complete = isinstance(entry, dict) and type(entry.get("rank")) is int and entry["rank"] > 0
        if not (complete and type(entry.get("base")) is bool):
            raise UserError(
                f"{path / CONFIG}: factors: must give rank and base of each linear; name an export of "
                "this project"
            )
    buffers = values.get("buffers") or {}
    for name, buffer in buffers.items() if isinstance(buffers, dict) else [("buffers", buffers)]:
        if name not in factors or type(buffer) is not int or not 0 <= buffer < factors[name]["rank"]:
            raise UserError(
                f"{path / CONFIG}: buffers: {name}: {buffer!r}: must be a factorised linear and its "
                "buffer columns, fewer than all; name an export of this project"
            )
    return values


def _settings(path: Path) -> tuple[Config, int, tuple[str, ...]]:
    kind = model_type(path)
    assert kind is not None, "its callers have asked matches"
    return run_config(path, FACTORISED[kind], **_structure(_values(path)))


def _structure(values: dict) -> dict[str, str]:
    """The settings of a run with such factors."""
    separate = bool(values.get("separate_qkv"))
    attention = separate or any("attn." in name for name in values["factors"])
    return {
        "factorised_linears": "mlp-attention" if attention else "mlp",
        "qkv_factors": "separate" if separate else "fused",
    }


def _specs(path: Path, config: Config, listed: dict, buffers: dict) -> dict[str, FactorSpec]:
    linears, specs = factorisable(config), {}
    for name, entry in listed.items():
        if name not in linears:
            raise UserError(
                f"{path / CONFIG}: factors: {name}: is not a linear that can be factorised here; name an "
                "export of this project"
            )
        columns, base = entry["rank"], entry["base"]
        rank = columns - buffers.get(name, 0)
        specs[linears[name]] = FactorSpec(columns, columns, rank, frozen_base=base, final=not base)
    return {source: specs[source] for source in linears.values() if source in specs}
