"""Defaults that do not fit a setting that the user gave are changed, and the run says so.

A setting is the user's if it comes from a flag, a file of the user's own that ``--config`` names, or a
DeepSpeed JSON. All others, from a configuration of this project, a preset or the schema, are defaults.
``RULES``, and those of the run's method (``Method.adaptations``), are all that is adapted; what has no rule
is refused by ``checks.py``. The rules look at the settings and the number of processes alone, so that the
same command adapts in the same way when a run is resumed; those that look at the number of processes touch
only settings that may change then.
"""

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from inrank_megatron.config.loading import auto_size, flatten, from_flat
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import smallest_dim
from inrank_megatron.lowrank.methods.registry import METHODS
from inrank_megatron.lowrank.methods.settings import Adaptation

LARGEST_RATE_OF_ADAM = 2e-3
"""Of new weights in the first run: its gradients explode at the rate that is Muon's there, 1e-2."""


@dataclass(frozen=True)
class Asked:
    """The run as it is, the names of the user's own settings, the number of processes, and whether the
    settings come from a configuration of this project.
    """

    config: Config
    given: Set[str]
    world_size: int
    from_shipped: bool

    @property
    def min_dim(self) -> int:
        return smallest_dim(self.config)

    def free(self, name: str) -> bool:
        """Whether nobody gave the setting, so that its default may be changed."""
        return name not in self.given


def adapt(
    settings: Mapping[str, Any],
    given: Set[str],
    *,
    origins: Mapping[str, str],
    world_size: int,
    from_shipped: bool,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """``settings`` with the defaults among them adapted, and a line for each that was.

    Args:
        settings: flat, as in a file. given: names of those that are the user's. origins: where the others
            come from. from_shipped: whether they do from a configuration of this project.

    Raises:
        UserError: as ``from_flat``.
    """
    settings, notes = dict(settings), []
    config = from_flat(settings)
    for rule in (*RULES, *METHODS[config.training.method].adaptations):
        for name, value, reason in list(rule(Asked(config, given, world_size, from_shipped))):
            old = flatten(config)[name]
            settings[name] = value
            config = from_flat(settings)
            origin = f" from {origins[name]}" if name in origins else ""
            notes.append(f"{name} {_shown(old)}{origin} gives way to {_shown(value)}: {reason}")
    return settings, tuple(notes)


def _heads(asked: Asked) -> Iterator[Adaptation]:
    """Heads that fit the user's width, or a width that fits them; RoPE needs an even head size."""
    model = asked.config.model
    unit = 2 if model.model_type == "llama" and model.kv_channels is None else 1
    h, heads = model.hidden_size, model.num_attention_heads
    if h % (heads * unit) == 0:
        return
    features = f"{'an even number of features' if unit == 2 else 'a whole number of features'} per head"
    if asked.free("num_attention_heads") and h % unit == 0:
        legal = (n for n in range(1, h // unit + 1) if h // unit % n == 0)
        closest = min(legal, key=lambda n: abs(n - heads))
        yield "num_attention_heads", closest, f"so that hidden_size = {h} gives {features}"
    elif asked.free("hidden_size"):
        width = -(-h // (heads * unit)) * heads * unit
        yield "hidden_size", width, f"so that num_attention_heads = {heads} gives {features}"


def _query_groups(asked: Asked) -> Iterator[Adaptation]:
    """Groups of a preset that do not divide the heads."""
    model = asked.config.model
    heads, groups = model.num_attention_heads, model.query_groups
    if heads % groups and asked.free("num_query_groups"):
        closest = min((n for n in range(1, heads + 1) if heads % n == 0), key=lambda n: abs(n - groups))
        yield "num_query_groups", closest, f"it must divide num_attention_heads = {heads}"


def _positions(asked: Asked) -> Iterator[Adaptation]:
    model = asked.config.model
    if model.seq_length > model.max_position_embeddings and asked.free("seq_length"):
        most = model.max_position_embeddings
        yield "seq_length", most, f"there are only max_position_embeddings = {most} positions"


def _tensor_parallel(asked: Asked) -> Iterator[Adaptation]:
    size, world = asked.config.parallel.tensor_model_parallel_size, asked.world_size
    if not asked.free("tensor_model_parallel_size"):
        return
    if size != "auto" and world % size:
        size = auto_size(asked.config, world)
        yield "tensor_model_parallel_size", size, f"there are {world} processes"
    elif size == "auto" and world % 2 == 0 and auto_size(asked.config, world) == 1:
        yield "tensor_model_parallel_size", 1, "the model with your settings cannot be divided by two"


def _sequence_parallel(asked: Asked) -> Iterator[Adaptation]:
    parallel, length = asked.config.parallel, asked.config.model.seq_length
    size = parallel.tensor_model_parallel_size
    if size != "auto" and length % size and parallel.sequence_parallel and asked.free("sequence_parallel"):
        yield "sequence_parallel", False, f"seq_length = {length} cannot be divided by {size}"


def _micro_batch(asked: Asked) -> Iterator[Adaptation]:
    training, size = asked.config.training, asked.config.parallel.tensor_model_parallel_size
    size = auto_size(asked.config, asked.world_size) if size == "auto" else size
    replicas, batch, micro = asked.world_size // size, training.global_batch_size, training.micro_batch_size
    if batch is None or asked.world_size % size or batch % replicas or not asked.free("micro_batch_size"):
        return
    if (each := batch // replicas) % micro:
        fitting = max(n for n in range(1, min(micro, each) + 1) if each % n == 0)
        yield (
            "micro_batch_size",
            fitting,
            f"global_batch_size = {batch} leaves {each} sequences for each replica",
        )


def _optimizers(asked: Asked) -> Iterator[Adaptation]:
    """An optimizer that the user names steps all parameters, unless the user names Muon, too."""
    optimizer = asked.config.optimizer
    if asked.free("optimizer"):
        return
    for name in ("matrix_optimizer", "factor_optimizer"):
        if getattr(optimizer, name) != "adamw" and asked.free(name):
            yield name, "adamw", f"optimizer = {optimizer.optimizer!r} is to step all parameters"


def _rate_of_adam(asked: Asked) -> Iterator[Adaptation]:
    """A rate that this project chose for Muon is too high for Adam on the same weights. A run that goes on
    keeps its rate.
    """
    optimizer = asked.config.optimizer
    steps_weights = "adamw" in (optimizer.matrix_optimizer, optimizer.factor_optimizer)
    if asked.from_shipped and asked.free("lr") and steps_weights and optimizer.lr > LARGEST_RATE_OF_ADAM:
        yield "lr", LARGEST_RATE_OF_ADAM, "the rate is meant for Muon"


def _rates(asked: Asked) -> Iterator[Adaptation]:
    """A warm-up no shorter than the schedule becomes a tenth of it; so does a last rate above the peak."""
    optimizer, steps = asked.config.optimizer, asked.config.decay_iters
    if optimizer.lr_warmup_iters >= steps and asked.free("lr_warmup_iters"):
        yield "lr_warmup_iters", steps // 10, f"the learning rate's schedule has {steps} steps"
    if optimizer.min_lr > optimizer.lr and asked.free("min_lr"):
        yield "min_lr", optimizer.lr / 10, f"lr = {optimizer.lr:g}"


def _offload(asked: Asked) -> Iterator[Adaptation]:
    parallel = asked.config.parallel
    alone = asked.config.optimizer.optimizer == "cpu-adam" and not parallel.offload_optimizer
    if alone and asked.free("offload_optimizer"):
        yield "offload_optimizer", True, "optimizer = 'cpu-adam' needs its state in the host's memory"


def _shown(value: Any) -> str:
    return "left out" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


RULES: tuple[Callable[[Asked], Iterator[Adaptation]], ...] = (
    _heads,
    _query_groups,
    _positions,
    _tensor_parallel,
    _sequence_parallel,
    _micro_batch,
    _optimizers,
    _rate_of_adam,
    _rates,
    _offload,
)
