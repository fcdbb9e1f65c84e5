"""What a run takes from the checkpoint that it continues: step, identity, structure and values."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from inrank_megatron.checkpoint.folder import Checkpoint
from inrank_megatron.checkpoint.slices import Box
from inrank_megatron.checkpoint.weights import is_weights_only
from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.held import held_boxes
from inrank_megatron.engine.state import load_engine, recorded_structure
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.model.vocabulary import FullTensors, WithoutSpareRows
from inrank_megatron.training.fetching import fetch
from inrank_megatron.training.run_folder import RunFolder


def identity_of(checkpoint: Checkpoint, derived: dict, *, train_iters: int) -> dict:
    """The recorded identity; it wins over a newly ``derived`` one, so that the switch keeps its step.
    Weights alone belong to no run yet and take the derived one.
    """
    if is_weights_only(checkpoint.state):
        return derived
    recorded = checkpoint.state["identity"]
    if recorded["data"] != derived["data"]:
        raise UserError(
            f"{checkpoint.folder}: was trained on data {recorded['data'][:12]}, the settings now give "
            f"{derived['data'][:12]}; restore the text and tokenizer, or start again with another --save"
        )
    switch = recorded["switch_step"]
    if switch is not None and switch >= train_iters:
        raise UserError(
            f"train_iters = {train_iters}: the run in {checkpoint.folder.parent.parent} switches after step "
            f"{switch}, which must come before the last; raise --train-iters, or start again with another "
            "--save"
        )
    return recorded


def structure_of(checkpoint: Checkpoint, wanted: Mapping[str, FactorSpec]) -> dict[str, FactorSpec]:
    """The structure to build the engine with.

    Args:
        wanted: the structure that the run's method begins with, by which weights alone have to go on.
    """
    recorded = recorded_structure(checkpoint.state["engine"])
    if not is_weights_only(checkpoint.state):
        return recorded
    growing = {name: spec for name, spec in recorded.items() if not spec.final}
    for name, spec in growing.items():
        own = wanted.get(name)
        if own is None or (own.capacity, own.frozen_base) != (spec.capacity, spec.frozen_base):
            raise UserError(
                f"{checkpoint.folder}: {name} has {spec.capacity} columns {_base(spec)}, this method begins "
                f"with {'no factors' if own is None else f'{own.capacity} {_base(own)}'}; give that run's "
                "method and rank settings, or name final ranks when the weights are converted"
            )
    return recorded | {n: replace(spec, tracked=wanted[n].tracked) for n, spec in growing.items()}


def fill(engine: Engine, folder: RunFolder) -> None:
    """Give an engine of that structure the values of the checkpoint in ``folder``. Collective."""
    checkpoint = folder.opened
    assert checkpoint is not None
    if folder.leaders is not None:
        boxes = _stored_boxes(engine, checkpoint.names)
        fetch(checkpoint, boxes, leaders=folder.leaders, holders=folder.holders, parallel=engine.parallel)
    source: FullTensors = checkpoint
    factory: Any = engine.factory  # a run's, which knows the vocabulary
    if weights_only := is_weights_only(checkpoint.state):  # a converted model's vocabulary may be padded
        source = WithoutSpareRows(checkpoint, vocab_size=factory.vocab_size)
    load_engine(engine, checkpoint.state["engine"], source, weights_only=weights_only)
    checkpoint.received.clear()


def _stored_boxes(engine: Engine, names: Collection[str]) -> Iterator[tuple[str, Box]]:
    """What :func:`load_engine` is going to read: initial values that are not there begin as the factors."""
    for name, box in held_boxes(engine):
        for stored in (name, name.removesuffix("0")):
            if stored in names:
                yield stored, box
                break


def _base(spec: FactorSpec) -> str:
    return "next to W0" if spec.frozen_base else "without W0"
