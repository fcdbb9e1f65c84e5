"""The page of a plan, as plain text of at most 110 columns."""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from inrank_megatron.config.cli import Launch
from inrank_megatron.config.cluster import Cluster
from inrank_megatron.config.costs import Memory
from inrank_megatron.config.plan import WIDTH
from inrank_megatron.config.sizes import shown_size
from inrank_megatron.lowrank.methods.registry import METHODS
from inrank_megatron.planning.forecast import Forecast, slack_of
from inrank_megatron.planning.launching import launch_command
from inrank_megatron.planning.seconds import Link
from inrank_megatron.planning.space import Illegal
from inrank_megatron.planning.timeline import Assumed, columns_after_the_switch

SHOWN_REASONS = 8
LINKS: dict[Link, str] = {"node": "all within the node", "network": "all between nodes"}


@dataclass(frozen=True)
class Plan:
    """What a page shows.

    Args:
        flags: those of the run on the command line.
        rates: measured ones, as entries of a cluster file; empty: none was.
        rank_is_assumed: whether the final rank was not given.
        forecasts: of every legal topology, the best first.
        methods: every method on the first topology, or its name and why it cannot train there.
        break_even: the rank up to which factors cost no more operations than dense linears.
        most_layers: of the deepest model of this width that fits; None: the memory is not known.
    """

    launch: Launch
    flags: tuple[str, ...]
    cluster: Cluster
    rates: Mapping[str, float]
    assumed: Assumed
    rank_is_assumed: bool
    forecasts: list[Forecast]
    illegal: list[Illegal]
    methods: list[Forecast | tuple[str, str]]
    break_even: int
    most_layers: int | None

    @property
    def command(self) -> str:
        """What launches the run on the first topology."""
        return launch_command(self.flags, self.forecasts[0].candidate.config, self.cluster)


def page(plan: Plan, *, top: int) -> str:
    """The plan; ``top``: topologies to list."""
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, color_system=None, markup=False, emoji=False)
    for part in _parts(plan, top):
        console.print(part, soft_wrap=part == f"\n{plan.command}")
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _parts(plan: Plan, top: int) -> Iterator[Table | str]:
    first, cluster = plan.forecasts[0], plan.cluster
    fitting = sum(one.fits for one in plan.forecasts)
    yield f"cluster      {cluster.nodes} x {cluster.devices} x {cluster.device}"
    if plan.rates:
        yield "measured     " + ", ".join(f"{name} {value:.3g}" for name, value in plan.rates.items())
    how_many = "memory not known" if cluster.memory is None else f"{fitting} fit"
    yield f"topologies   {len(plan.forecasts)} legal, {how_many}; predicted, not measured"
    yield from _assumptions(plan)
    yield ""
    yield _ranking(plan.forecasts[:top])
    yield f"\nThe first: {_topology(first)}\n"
    yield _memory(first)
    yield ""
    yield _time(first)
    if any(phase.sent for phase in first.phases):
        yield ""
        yield _sent(first)
    yield ""
    yield from _whole_run(first)
    yield ""
    yield _methods(plan.methods)
    yield ""
    yield f"break-even   U V costs no more operations than dense linears up to rank {plan.break_even}"
    if plan.most_layers is not None:
        yield f"largest      {plan.most_layers:,} layers of this width fit, with recomputation, no offload"
    yield from _refused(plan.illegal)
    yield f"\n{plan.command}"


def _assumptions(plan: Plan) -> Iterator[str]:
    config = plan.launch.config
    if METHODS[config.training.method].switches:
        rank, multiple = plan.assumed.final_rank, config.inrank.rank_multiple_of
        by_budget = config.inrank.parameter_budget is not None
        why = "that of the parameter budget" if by_budget else "the largest that ranks can reach"
        why = f"{why}; --final-rank changes it" if plan.rank_is_assumed else "as given"
        if (columns := columns_after_the_switch(config, rank)) != rank:
            why += f"; {columns} with rank_multiple_of = {multiple}"
        yield f"final rank   {rank} ({why})"


def _ranking(forecasts: list[Forecast]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("", "TP", "DP", "ZeRO", "micro", "recompute", "offload", "SP", "memory", "step", "hours"):
        table.add_column(title, justify="right")
    for number, one in enumerate(forecasts, 1):
        config, topology = one.candidate.config, one.candidate.topology
        tp = topology.tensor_model_parallel_size
        table.add_row(
            str(number),
            str(tp),
            str(topology.data_parallel_size),
            str(config.parallel.zero_stage),
            str(topology.micro_batch_size),
            config.training.recompute_granularity or "-",
            _yes(config.parallel.offload_optimizer),
            _yes(tp > 1 and config.parallel.sequence_parallel),
            _memory_of(one),
            _seconds(one.step_seconds),
            _hours(one.hours),
        )
    return table


def _topology(one: Forecast) -> str:
    t = one.candidate.topology
    return (
        f"tensor-parallel {t.tensor_model_parallel_size} x data-parallel {t.data_parallel_size}, ZeRO "
        f"{one.candidate.config.parallel.zero_stage}, micro-batch {t.micro_batch_size} x accumulation "
        f"{t.accumulation_steps} x {t.data_parallel_size} = {t.global_batch_size} sequences"
    )


def _by_phase(title: str, one: Forecast, entries: Iterable[tuple[str, list[str]]]) -> Table:
    table = Table(title, *(phase.phase.name for phase in one.phases), box=None, pad_edge=False)
    for name, cells in entries:
        table.add_row(name, *cells)
    return table


def _memory(one: Forecast) -> Table:
    words, memories = {"parameters": "weights"}, one.memories
    table = Table("memory per device", *memories, box=None, pad_edge=False)
    for name in Memory.__dataclass_fields__:
        sizes = [getattr(memory, name) for memory in memories.values()]
        if any(sizes):
            table.add_row(words.get(name, name.replace("_", " ")), *map(shown_size, sizes))
    table.add_row("sum", *(shown_size(memory.total) for memory in memories.values()))
    table.add_row("allocator slack", *(shown_size(slack_of(memory)) for memory in memories.values()))
    return table


def _time(one: Forecast) -> Table:
    names = ("compute", "tensor_communication", "data_communication", "optimizer", "total")
    entries = [
        (name.replace("_", " "), [_seconds(getattr(p.time, name)) for p in one.phases]) for name in names
    ]
    entries.append(("steps", [f"{p.phase.steps:,}" for p in one.phases]))
    entries.append(("parameters", [f"{p.parameters.total:,}" for p in one.phases]))
    entries.append(("TFLOP per device and step", [_tera(p.flops) for p in one.phases]))
    return _by_phase("time of a step; what is waited for", one, entries)


def _sent(one: Forecast) -> Table:
    totals: list[Counter[str]] = []
    for phase in one.phases:
        sums: Counter[str] = Counter()
        for entry in phase.sent:
            sums[f"{entry.group}: {entry.what}, {entry.collective}"] += round(entry.sent)
        totals.append(sums)
    names = list(dict.fromkeys(name for sums in totals for name in sums))
    entries = [(name, [shown_size(sums[name]) for sums in totals]) for name in names]
    for link, words in LINKS.items():
        sizes = [phase.bytes_by_link[link] for phase in one.phases]
        if any(sizes):
            entries.append((words, [shown_size(round(size)) for size in sizes]))
    return _by_phase("sent per rank and step", one, entries)


def _whole_run(one: Forecast) -> Iterator[str]:
    parts = {phase.phase.name: phase.seconds for phase in one.phases} | vars(one.occasions)
    shown = ", ".join(f"{name.replace('_', ' ')} {_seconds(value)}" for name, value in parts.items() if value)
    yield f"run          {_hours(one.hours)} hours, {_hours(one.device_hours)} device-hours: {shown}"
    if one.energy is not None:
        yield f"energy       {one.energy:,.0f} kWh of the devices at full power"
    if one.price is not None:
        yield f"price        {one.price:,.2f}"


def _methods(methods: list[Forecast | tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("method, on the same topology")
    for title in ("parameters at the end", "memory", "step", "hours", "over the first row"):
        table.add_column(title, justify="right")
    hours = next((one.hours for one in methods if isinstance(one, Forecast)), 1.0)
    for one in methods:
        if isinstance(one, tuple):
            table.add_row(one[0], one[1])
            continue
        table.add_row(
            one.candidate.config.training.method,
            f"{one.phases[-1].parameters.total:,}",
            _memory_of(one),
            _seconds(one.step_seconds),
            _hours(one.hours),
            f"{one.hours / hours:.3f}",
        )
    return table


def _refused(illegal: list[Illegal]) -> Iterator[str]:
    reasons = Counter(one.reason for one in illegal)
    for reason, times in reasons.most_common(SHOWN_REASONS):
        yield f"not legal    {reason}" + (f" ({times} times)" if times > 1 else "")
    if len(reasons) > SHOWN_REASONS:
        yield f"             and {len(reasons) - SHOWN_REASONS} other reasons; --json has all"


def _memory_of(one: Forecast) -> str:
    return shown_size(one.memory) + ("" if one.fits else " (too much)")


def _yes(value: bool) -> str:
    return "yes" if value else "-"


def _hours(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def _tera(value: float) -> str:
    value /= 1e12
    return f"{value:,.1f}" if value >= 1 else f"{value:.3g}"


def _seconds(value: float) -> str:
    if value >= 7200:
        return f"{value / 3600:,.1f} h"
    return f"{value:,.1f} s" if value >= 100 else f"{value:.3g} s"
