"""What a run will do, said before it starts: the page that `--dry-run` prints."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from inrank_megatron.config.checks import Topology
from inrank_megatron.config.cluster import Cluster
from inrank_megatron.config.costs import (
    Memory,
    Parameters,
    break_even_rank,
    device_peak_flops,
    flops_per_token,
    memory_per_device,
    parameters,
    precision,
)
from inrank_megatron.config.loading import PRESETS, SIZES, fields, flatten, from_flat, inrank_preset
from inrank_megatron.config.schema import Config
from inrank_megatron.config.sizes import shown_size
from inrank_megatron.lowrank.methods.registry import idle_settings
from inrank_megatron.lowrank.methods.schedule import SWITCHING

WIDTH = 110


@dataclass(frozen=True)
class Phase:
    """Costs of one phase at one number of columns, over the whole model; memory on one device."""

    name: str
    columns: int | None
    parameters: Parameters
    flops_per_token: int
    memory: Memory


_Phase = tuple[str, int | None, int | None, bool]


@dataclass(frozen=True)
class Setting:
    """A setting that differs from its default; `idle`: the run's method does not read it."""

    name: str
    value: Any
    default: Any
    idle: bool


@dataclass(frozen=True)
class Plan:
    """A run before it starts. The first of the phases is the dense model, to compare with."""

    method: str
    device: str
    device_memory: int | None
    place: str
    vocabulary: str
    precision: str
    peak_flops: float | None
    topology: Topology
    zero_stage: int
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
        peak_flops=device_peak_flops(device, precision(config)),
        topology=topology,
        zero_stage=config.parallel.zero_stage,
        seq_length=config.model.seq_length,
        train_iters=config.training.train_iters,
        break_even_rank=break_even_rank(config),
        phases=tuple(
            Phase(
                name=name,
                columns=columns,
                parameters=parameters(config, vocab_size, ranks=columns, frozen_base=base),
                flops_per_token=flops_per_token(
                    config, topology.padded_vocab_size, ranks=columns, frozen_base=base
                ),
                memory=memory_per_device(config, topology, ranks=allocated, frozen_base=base, device=device),
            )
            for name, columns, allocated, base in _phases(config, topology)
        ),
        settings=tuple(changed_settings(config)),
    )


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
    default |= dict.fromkeys(sizes) | {"model_type": "gpt2", "method": "dense"}
    default |= {**PRESETS.get(flat["model_preset"], {}), **inrank_preset(flat)}
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


def _phases(config: Config, topology: Topology) -> list[_Phase]:
    """(name, columns that count, columns that are allocated, beside W0) of each row of the cost table."""
    method, initial, largest = config.training.method, config.inrank.initial_rank, topology.capacity
    dense: _Phase = ("dense", None, None, False)
    if method == "dense":
        return [dense]
    if method == "fixed-rank":
        return [dense, ("fixed rank", largest, largest, False)]
    if method in ("lora", "relora"):
        return [dense, ("W0 + U V", largest, largest, True)]
    columns = break_even_rank(config)
    break_even: _Phase = ("phase 2, U V, break-even", columns, columns, False)
    if method == "warm-start":
        return [dense, break_even]
    base = config.inrank.frozen_base
    product = "W0 + U V" if base else "U V"
    rows: list[_Phase] = [
        dense,
        (f"phase 1, {product}, at the start", initial + topology.buffer, largest, base),
        (f"phase 1, {product}, all columns", largest, largest, base),
    ]
    if method == "inrank":
        return rows
    ranks = {"initial rank": initial, "largest rank": largest - topology.buffer}
    if config.inrank.final_ranks == "output":  # which knows no bound but the width
        ranks = {}
    rows += [(f"phase 2, U V, {name}", rank, rank, False) for name, rank in ranks.items()]
    return [*rows, break_even]


def _head(plan: Plan) -> list[str]:
    t = plan.topology
    tokens = t.global_batch_size * plan.seq_length
    lines = [
        f"method       {plan.method}",
        f"planned for  {plan.place}",
        f"topology     {t.world_size} processes = tensor-parallel {t.tensor_model_parallel_size} x "
        f"data-parallel {t.data_parallel_size}, ZeRO stage {plan.zero_stage}, on {plan.device}",
        f"batch        {t.global_batch_size} sequences = micro {t.micro_batch_size} x accumulation "
        f"{t.accumulation_steps} x data-parallel {t.data_parallel_size}",
        f"tokens       {t.global_batch_size} x {plan.seq_length} = {tokens:,} a step, x {plan.train_iters:,} "
        f"steps = {tokens * plan.train_iters:,}",
        f"vocabulary   {t.vocab_size:,}, padded to {t.padded_vocab_size:,}"
        + (f" ({plan.vocabulary})" if plan.vocabulary else ""),
    ]
    if plan.peak_flops:
        lines.append(f"peak         {plan.peak_flops / 1e12:g} TFLOP/s a device in {plan.precision}")
    elif plan.device_memory is not None:
        lines.append(f"peak         {plan.device} has none in {plan.precision}; give --fp16")
    if plan.device_memory is not None:
        lines.append(f"memory       {_fit(plan)}")
    if plan.method in ("inrank", "inrank-efficient"):
        lines.append(f"columns      buffer {t.buffer}, at most {t.capacity} of {t.min_dim} in an MLP linear")
    return lines


def _cost_table(plan: Plan) -> Table:
    table = Table("", box=None, pad_edge=False)
    for title in ("columns", "parameters", "trainable", "MFLOP/token", "over dense", "memory/device"):
        table.add_column(title, justify="right")
    dense = plan.phases[0].flops_per_token
    for phase in plan.phases:
        table.add_row(
            phase.name,
            "" if phase.columns is None else f"{phase.columns:,}",
            f"{phase.parameters.total:,}",
            f"{phase.parameters.trainable:,}",
            f"{phase.flops_per_token / 1e6:,.1f}",
            f"{phase.flops_per_token / dense:.3f}",
            shown_size(phase.memory.total),
        )
    return table


def largest_phase(config: Config, topology: Topology) -> tuple[str, int | None, bool]:
    """The phase that takes the most memory: its name, the columns that it allocates, whether W0 is there."""
    name, _, allocated, base = _phases(config, topology)[_largest_index(config.training.method)]
    return name, allocated, base


def _largest_index(method: str) -> int:
    """Of the run itself; InRank's first phase with all columns. A warm start begins dense."""
    return {"dense": 0, "warm-start": 0, "fixed-rank": 1, "lora": 1, "relora": 1}.get(method, 2)


def _largest(plan: Plan) -> Phase:
    return plan.phases[_largest_index(plan.method)]


def _fit(plan: Plan) -> str:
    """Whether the largest phase fits; a tenth is left to the libraries and to fragmentation."""
    needed, there = _largest(plan).memory.total, plan.device_memory
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
        f"Memory of {first.name}: parameters {shown_size(memory.parameters)}, gradients "
        f"{shown_size(memory.gradients)},",
        f"FP32 master weights and Adam moments {shown_size(memory.optimizer)}, initial factors "
        f"{shown_size(memory.initial_factors)}, activations about {shown_size(memory.activations)},",
        f"gradient reduction bucket {shown_size(memory.bucket)}.",
    ]
    if plan.method in SWITCHING:
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
