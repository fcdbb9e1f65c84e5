"""Every topology on which a run could train, and why others cannot."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from inrank_megatron.config.checks import check
from inrank_megatron.config.cluster import Cluster
from inrank_megatron.config.costs import precision
from inrank_megatron.config.deepspeed_json import passthrough
from inrank_megatron.config.devices import attained_flops
from inrank_megatron.config.schema import Config
from inrank_megatron.config.topology import Topology, topology_of
from inrank_megatron.errors import UserError

DIMENSIONS = (
    "tensor_model_parallel_size",
    "zero_stage",
    "offload_optimizer",
    "sequence_parallel",
    "micro_batch_size",
    "recompute_granularity",
)
"""Settings that a plan chooses. They change no result beyond rounding."""


@dataclass(frozen=True)
class Candidate:
    """A legal choice of the dimensions."""

    config: Config
    topology: Topology


@dataclass(frozen=True)
class Illegal:
    """A choice that is refused: its settings, of which those left out do not matter, and the reason."""

    settings: dict[str, Any]
    reason: str


def candidates(
    config: Config, cluster: Cluster, *, vocab_size: int | None, pinned: Collection[str] = ()
) -> Iterator[Candidate | Illegal]:
    """Every choice of the `DIMENSIONS` for a run on a cluster.

    Args:
        config: the run, with a global batch.
        vocab_size: of the tokenizer, without padding; None: that of the run.
        pinned: dimensions that keep their values.

    Raises:
        UserError: the device does not compute in the run's precision.
    """
    if attained_flops(cluster.kind, precision(config)) is None:
        raise UserError(f"{cluster.device} does not compute in {precision(config)}; give --fp16, or neither")
    world = cluster.world_size
    for tp in _choices(config, "tensor_model_parallel_size", pinned, _divisors(world)):
        whole = {"tensor_model_parallel_size": tp}
        replicas = config.training.global_batch_size or world
        smallest = {"micro_batch_size": 1, "sequence_parallel": False, "zero_stage": 1}
        smallest["offload_optimizer"] = needs_offload(config)
        if reason := _fault(changed(config, whole | smallest), world):
            yield Illegal(whole, reason)
            continue
        micros = _choices(config, "micro_batch_size", pinned, _divisors(replicas // (world // tp)))
        for split in _splits(config, tp, pinned):
            yield from _of_size(config, cluster, whole | split, micros, vocab_size, pinned)


def changed(config: Config, settings: dict[str, Any]) -> Config:
    """A copy with other values of dimensions, which `check` still has to pass."""
    sections = {}
    for name in ("parallel", "training"):
        section = getattr(config, name)
        mine = {key: value for key, value in settings.items() if key in type(section).model_fields}
        sections[name] = section.model_copy(update=mine)
    return config.model_copy(update=sections)


def needs_offload(config: Config) -> bool:
    """Whether the run's optimizer computes on the host alone."""
    return config.optimizer.optimizer == "cpu-adam"


def agreeing(one: Candidate | Illegal, deepspeed_config: dict[str, Any] | None) -> Candidate | Illegal:
    """``one``, or why the user's DeepSpeed JSON does not allow it."""
    if isinstance(one, Candidate) and deepspeed_config is not None:
        try:
            passthrough(deepspeed_config, one.config, one.topology)
        except UserError as error:
            return Illegal(settings_of(one.config), str(error).split("; ")[0])
    return one


def settings_of(config: Config) -> dict[str, Any]:
    """The dimensions of a run."""
    return {
        name: getattr(config.parallel if hasattr(config.parallel, name) else config.training, name)
        for name in DIMENSIONS
    }


def _of_size(
    config: Config, cluster: Cluster, sizes: dict, micros: list, vocab_size: int | None, pinned: Collection
) -> Iterator[Candidate | Illegal]:
    # The memory of a CPU is the host's already.
    offloads = [False, True] if cluster.device != "cpu" else [needs_offload(config)]
    for stage in _choices(config, "zero_stage", pinned, [0, 1, 2, 3]):
        for offload in _choices(config, "offload_optimizer", pinned, offloads):
            fixed = sizes | {"zero_stage": stage, "offload_optimizer": offload}
            if reason := _fault(changed(config, fixed | {"micro_batch_size": micros[0]}), cluster.world_size):
                yield Illegal(fixed, reason)
                continue
            for micro in micros:
                for again in _choices(config, "recompute_granularity", pinned, [None, "full"]):
                    whole = fixed | {"micro_batch_size": micro, "recompute_granularity": again}
                    run = changed(config, whole)
                    topology = topology_of(run, world_size=cluster.world_size, vocab_size=vocab_size)
                    yield Candidate(run, topology)


def _splits(config: Config, tp: int, pinned: Collection[str]) -> list[dict[str, Any]]:
    """Values of sequence parallelism, which means nothing without tensor parallelism."""
    if tp == 1:
        return [{}]
    return [{"sequence_parallel": v} for v in _choices(config, "sequence_parallel", pinned, [True, False])]


def _choices(config: Config, name: str, pinned: Collection[str], values: list) -> list:
    return [settings_of(config)[name]] if name in pinned else values


def _fault(config: Config, world_size: int) -> str | None:
    """Why a run is refused, in one clause; None: it is not."""
    try:
        check(config, world_size=world_size)
    except UserError as error:
        return str(error).split("; ")[0]
    return None


def _divisors(number: int) -> list[int]:
    below = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*below, *(number // n for n in below)})
