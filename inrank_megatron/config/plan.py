"""The page that `--dry-run` prints: what a run will do and cost."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from inrank_megatron.config.cluster import Cluster
from inrank_megatron.config.costs import (
    Memory,
    Parameters,
    break_even_rank,
    flops_per_token,
    memory_per_device,
    parameters,
    precision,
    zero_stage_in_use,
)
from inrank_megatron.config.devices import device_peak_flops, peak_flops
from inrank_megatron.config.loading import PRESETS, SIZES, fields, flatten, from_flat, method_preset
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import smallest_dim
from inrank_megatron.config.sizes import shown_size
from inrank_megatron.config.topology import Topology
from inrank_megatron.lowrank.methods.base import DENSE, Columns, PhaseShape
from inrank_megatron.lowrank.methods.registry import METHODS, idle_settings

WIDTH = 110


@dataclass(frozen=True)
class Phase:
    """Costs of one phase at one number of columns, over the whole model; memory on one device."""

    shape: PhaseShape
    parameters: Parameters
    flops_per_token: int
    memory: Memory


@dataclass(frozen=True)
class Setting:
    """A setting that differs from its default; `idle`: the run's method does not read it."""

    name: str
    value: Any
    default: Any
    idle: bool


@dataclass(frozen=True)
class Plan:
    """The plan of a run. The first of its phases is the dense model, for comparison."""

    method: str
    device: str
    device_memory: int | None
    place: str
    vocabulary: str
    precision: str
    peak_flops: float | None
    topology: Topology
    columns: Columns
    min_dim: int
    zero_stage: int
    zero_stage_in_use: int
    seq_length: int
    train_iters: int
    break_even_rank: int
    phases: tuple[Phase, ...]
    settings: tuple[Setting, ...]


def make_plan(
    config: Config,
    topology: Topology,
    *,
    vocab_size: int,
    device: str,
    cluster: Cluster | None = None,
    vocabulary: str = "",
) -> Plan:
    """The plan of a run that `checks.check` has passed.

    Args:
        vocab_size: the true vocabulary; parameters count it, operations and memory its padding.
        device: name of the device, "cpu" or as `torch.cuda.get_device_name` gives it.
        cluster: what the plan is for; None: the processes of this launch.
        vocabulary: where its size is from.
    """
    return Plan(
        method=config.training.method,
        device=device,
        device_memory=cluster.memory if cluster else None,
        place=_place(cluster),
        vocabulary=vocabulary,
        precision=precision(config),
        peak_flops=_peak(cluster, device, precision(config)),
        topology=topology,
        columns=columns_of(config),
        min_dim=smallest_dim(config),
        zero_stage=config.parallel.zero_stage,
        zero_stage_in_use=zero_stage_in_use(config, topology.data_parallel_size),
        seq_length=config.model.seq_length,
        train_iters=config.training.train_iters,
        break_even_rank=break_even_rank(config),
        phases=tuple(_costs_of(shape, config, topology, vocab_size, device) for shape in _rows(config)),
        settings=tuple(changed_settings(config)),
    )


def _costs_of(shape: PhaseShape, config: Config, topology: Topology, vocab_size: int, device: str) -> Phase:
    counted: dict[str, Any] = {"ranks": shape.columns, "frozen_base": shape.frozen_base}
    return Phase(
        shape=shape,
        parameters=parameters(config, vocab_size, **counted),
        flops_per_token=flops_per_token(config, topology.padded_vocab_size, **counted),
        memory=memory_per_device(
            config, topology, ranks=shape.capacity, frozen_base=shape.frozen_base, device=device
        ),
    )


def _peak(cluster: Cluster | None, device: str, dtype: str) -> float | None:
    return peak_flops(cluster.kind, dtype) if cluster else device_peak_flops(device, dtype)


def _place(cluster: Cluster | None) -> str:
    if cluster is None:
        return "the processes of this launch; --cluster 8xA100-80GB, say, plans for others"
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes} nodes"
    return f"{nodes} of {cluster.devices} x {cluster.device}"


def changed_settings(config: Config) -> list[Setting]:
    """Every setting whose value is neither the schema's default nor what the presets and the sizes imply."""
    flat = flatten(config)
    sizes = (*SIZES, "train_iters")
    default = flatten(from_flat({name: flat[name] for name in (*sizes, "model_type", "method")}))
    default |= dict.fromkeys(sizes) | {name: fields()[name].default for name in ("model_type", "method")}
    default |= {**PRESETS.get(flat["model_preset"], {}), **method_preset(flat)[1]}
    idle = idle_settings(flat["method"])
    return [
        Setting(name, flat[name], default[name], name in idle)
        for name in fields()
        if flat[name] != default[name]
    ]


def render(plan: Plan) -> str:
    """The plan as plain text, at most 110 columns wide."""
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, color_system=None, markup=False, emoji=False)
    for part in (*_head(plan), "", _cost_table(plan), *_notes(plan), "", _settings_table(plan)):
        console.print(part)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def columns_of(config: Config) -> Columns:
    """The columns of an MLP linear's factors."""
    return METHODS[config.training.method].columns(config, smallest_dim(config))


def _phases(config: Config) -> list[PhaseShape]:
    """Those of the run, in order."""
    method = METHODS[config.training.method]
    return method.phases(config, columns_of(config), break_even=break_even_rank(config))


def _rows(config: Config) -> list[PhaseShape]:
    """Of the cost table: the dense model comes first, to compare with."""
    phases = _phases(config)
    return phases if phases[0] == DENSE else [replace(DENSE, is_largest=False), *phases]


def _head(plan: Plan) -> list[str]:
    t = plan.topology
    tokens = t.global_batch_size * plan.seq_length
    lines = [
        f"method       {plan.method} (docs/{METHODS[plan.method].page})",
        f"planned for  {plan.place}",
        f"topology     {t.world_size} processes = tensor-parallel {t.tensor_model_parallel_size} x "
        f"data-parallel {t.data_parallel_size}, {_zero(plan)}, on {plan.device}",
        f"batch        {t.global_batch_size} sequences = micro {t.micro_batch_size} x accumulation "
        f"{t.accumulation_steps} x data-parallel {t.data_parallel_size}",
        f"tokens       {t.global_batch_size} x {plan.seq_length} = {tokens:,} per step, x "
        f"{plan.train_iters:,} steps = {tokens * plan.train_iters:,}",
        f"vocabulary   {t.vocab_size:,}, padded to {t.padded_vocab_size:,}"
        + (f" ({plan.vocabulary})" if plan.vocabulary else ""),
    ]
    if plan.peak_flops:
        lines.append(f"peak         {plan.peak_flops / 1e12:g} TFLOP/s per device in {plan.precision}")
    elif plan.device_memory is not None:
        lines.append(f"peak         {plan.device} has none in {plan.precision}; give --fp16")
    if plan.device_memory is not None:
        lines.append(f"memory       {_fit(plan, plan.device_memory)}")
    if plan.columns.buffer:
        buffer, most = plan.columns
        lines.append(f"columns      buffer {buffer}, at most {most} of {plan.min_dim} in an MLP linear")
    return lines


def _zero(plan: Plan) -> str:
    if plan.zero_stage_in_use == plan.zero_stage:
        return f"ZeRO stage {plan.zero_stage}"
    return f"ZeRO stage {plan.zero_stage_in_use} ({plan.zero_stage} shards nothing)"


def _cost_table(plan: Plan) -> Table:
    table = Table("", box=None, pad_edge=False)
    for title in ("columns", "parameters", "trainable", "MFLOP/token", "over dense", "memory/device"):
        table.add_column(title, justify="right")
    dense = plan.phases[0].flops_per_token
    for phase in plan.phases:
        table.add_row(
            phase.shape.name,
            "" if phase.shape.columns is None else f"{phase.shape.columns:,}",
            f"{phase.parameters.total:,}",
            f"{phase.parameters.trainable:,}",
            f"{phase.flops_per_token / 1e6:,.1f}",
            f"{phase.flops_per_token / dense:.3f}",
            shown_size(phase.memory.total),
        )
    return table


def largest_phase(config: Config) -> PhaseShape:
    """The phase of the run that takes the most memory."""
    return next(phase for phase in _phases(config) if phase.is_largest)


def _largest(plan: Plan) -> Phase:
    return next(phase for phase in plan.phases if phase.shape.is_largest)


def _fit(plan: Plan, there: int) -> str:
    """Whether the largest phase fits; a tenth is left to the libraries and to fragmentation."""
    needed = _largest(plan).memory.total
    sizes = f"{shown_size(needed)} of the {shown_size(there)} of each {plan.device}"
    if needed <= 0.9 * there:
        return f"fits: {sizes}"
    remedy = (
        "lower --micro-batch-size, or give --recompute-granularity full, a larger --zero-stage or more GPUs"
    )
    return f"{'tight' if needed <= there else 'does not fit'}: {sizes}; {remedy}"


def _notes(plan: Plan) -> list[str]:
    first = _largest(plan)
    memory = first.memory
    notes = [
        "",
        "Parameters count the true vocabulary, operations the padded one, forward and backward.",
        f"Memory of {first.shape.name}: parameters {shown_size(memory.parameters)}, gradients "
        f"{shown_size(memory.gradients)},",
        f"FP32 master weights and moments {shown_size(memory.optimizer)}, initial factors "
        f"{shown_size(memory.initial_factors)}, activations about {shown_size(memory.activations)},",
        f"gradient reduction bucket {shown_size(memory.bucket)}, gathered factors and parameters "
        f"{shown_size(memory.gathered_factors + memory.gathered_parameters)}.",
    ]
    if METHODS[plan.method].switches:
        notes.append(
            f"The run finds the ranks of phase 2; it is cheaper than dense up to rank {plan.break_even_rank}."
        )
    return notes


def _settings_table(plan: Plan) -> Table | str:
    if not plan.settings:
        return "All settings have their defaults."
    table = Table("setting", "value", "default", "", box=None, pad_edge=False)
    for setting in plan.settings:
        note = f"not read by method {plan.method}" if setting.idle else ""
        table.add_row(setting.name, _text(setting.value), _text(setting.default), note)
    return table


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)
