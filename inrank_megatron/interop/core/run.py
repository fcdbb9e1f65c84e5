"""Run folders, or one checkpoint in them: the best checkpoint's weights; and new ones, to train on from."""

import math
from collections.abc import Iterator
from dataclasses import replace as changed
from pathlib import Path

from torch import Tensor

from inrank_megatron.checkpoint.folder import Checkpoint
from inrank_megatron.checkpoint.locate import CONFIG, TOKENIZER, locate
from inrank_megatron.checkpoint.weights import write_weights
from inrank_megatron.checkpoint.writing import FILE_BYTES
from inrank_megatron.config.folders import named_path
from inrank_megatron.config.loading import load, replace, to_yaml
from inrank_megatron.config.schema import Config
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.tokenizer_files import copy_tokenizer
from inrank_megatron.interop.core.weights import Weights, account, check_layers, training_method
from inrank_megatron.lowrank.layers.spec import FactorSpec

NAME = "run"
WORD_EMBEDDING = "embedding.word_embeddings.weight"
STATE_LEAVES = ("U0", "V0")
"""Next to weights and moments a checkpoint holds the first values of tracked factors."""


def matches(path: Path) -> bool:
    """Whether ``path`` is a run folder or a checkpoint in one."""
    return (path / CONFIG).is_file() or (path.parent.name == "checkpoints" and path.name.startswith("step_"))


def open_weights(path: Path, options: Options) -> Weights:
    """The FP32 master weights, and W0 as stored, of a run's best checkpoint, or of the one ``path``.

    Raises:
        UserError: there is no such folder, no run or no complete checkpoint in it, or its tensors are not
            those that its configuration asks for.
    """
    run, checkpoint, faults = locate(path, best=True)
    config = load(run / CONFIG)
    check_layers(str(checkpoint.folder), config, tensors=len(checkpoint.names))
    specs = {
        name: FactorSpec.from_record(spec) for name, spec in checkpoint.state["engine"]["factors"].items()
    }
    weights = Weights(
        origin=str(checkpoint.folder),
        config=config,
        vocab_size=checkpoint.shape(WORD_EMBEDDING)[0],
        factors=specs,
        read=_reader(checkpoint, specs),
        step=checkpoint.state["step"],
        tokenizer=_tokenizer(run, config, checkpoint.state.get("identity") or {}),
        notes=tuple(f"passed over: {fault}" for fault in faults),
    )
    with_all_columns = {name: changed(spec, active_columns=spec.capacity) for name, spec in specs.items()}
    account(
        weights.origin,
        there={name: checkpoint.shape(name) for name in _weight_names(checkpoint)},
        here=changed(weights, factors=with_all_columns).shapes,
    )
    return weights


def write(weights: Weights, folder: Path, options: Options) -> None:
    """A run folder to resume (``--resume auto``) with a fresh optimizer or, if it is dense, to start other
    methods from (``--pretrained-checkpoint``).
    """
    specs = {
        name: changed(
            spec, capacity=spec.active_columns, tracked=False, final=not spec.frozen_base, grown_at=0
        )
        for name, spec in weights.factors.items()
    }
    rank = max((spec.active_columns for spec in specs.values()), default=None)
    config = replace(
        weights.config, method=training_method(specs), rank=rank, save=None, pretrained_checkpoint=None
    )
    if weights.tokenizer is not None:
        copy_tokenizer(weights.tokenizer, folder / TOKENIZER)
    (folder / CONFIG).write_text(to_yaml(config), encoding="utf-8")
    largest = 4 * max(math.prod(shape) for shape in weights.shapes.values())
    write_weights(
        folder / "checkpoints",
        step=weights.step,
        factors=specs,
        tensors=_tensors(weights),
        file_bytes=min(FILE_BYTES, largest),  # so that few tensors wait for their file
    )


def _tensors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    for name in weights.shapes:
        linear, _, leaf = name.rpartition(".")
        tensor = weights.read(name)
        # Everything that is trained has an FP32 master; a frozen W0 has not.
        frozen = leaf == "weight" and linear in weights.factors
        yield name, tensor if frozen else tensor.float()


def _weight_names(checkpoint: Checkpoint) -> list[str]:
    names = checkpoint.names
    # A moment's name is that of its parameter with one word more.
    return [
        n for n in names if n.rpartition(".")[0] not in names and n.rpartition(".")[2] not in STATE_LEAVES
    ]


def _reader(checkpoint: Checkpoint, specs: dict[str, FactorSpec]):
    def read(name: str) -> Tensor:
        [(_, tensor)] = checkpoint.tensors([name])
        linear, _, leaf = name.rpartition(".")
        if leaf in ("U", "V", *STATE_LEAVES):
            columns = specs[linear].active_columns
            tensor = tensor[:, :columns] if leaf[0] == "U" else tensor[:columns]
        return tensor

    return read


def _tokenizer(run: Path, config: Config, identity: dict) -> Path | None:
    candidates = [run / TOKENIZER]
    if "data" in identity:
        candidates.append(named_path(config.data.data_cache_path) / identity["data"] / TOKENIZER)
    if config.data.tokenizer:
        candidates.append(named_path(config.data.tokenizer))
    return next((path for path in candidates if path.is_dir()), None)
