"""What ``tools/plan.py`` does: read a run and a cluster, plan every topology, print a page or JSON."""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from inrank_megatron.config.checks import check
from inrank_megatron.config.cli import Launch, parse
from inrank_megatron.config.cluster import Cluster, with_rates
from inrank_megatron.config.costs import break_even_rank
from inrank_megatron.config.flags import kebab
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import smallest_dim
from inrank_megatron.config.sizes import shown_size
from inrank_megatron.config.start import StartSettings, no_start
from inrank_megatron.config.tool_options import count, tool_parser
from inrank_megatron.data.vocabulary import planned_vocabulary
from inrank_megatron.errors import UserError
from inrank_megatron.planning.comparison import most_layers, other_methods
from inrank_megatron.planning.forecast import Forecast, fits, forecast, ranking
from inrank_megatron.planning.page import Plan, page
from inrank_megatron.planning.rows import illegal_rows, rows, total_row
from inrank_megatron.planning.space import (
    DIMENSIONS,
    Candidate,
    Illegal,
    agreeing,
    candidates,
    settings_of,
)
from inrank_megatron.planning.timeline import Assumed, assumed_rank


def options(argv: list[str], *, description: str) -> argparse.Namespace:
    """The options of this tool, and as ``flags`` those of the run."""
    parser = tool_parser("plan.py", description)
    parser.usage = "python tools/plan.py --cluster NAME [options] [flags of launch/pretrain_gpt2.py]"
    parser.add_argument(
        "--cluster",
        required=True,
        metavar="[NODESx]NxDEVICE|FILE.yaml",
        help="the machines, as for --dry-run, such as 8xA100-80GB, or a file that describes them",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure the rates that this machine attains, and plan with them in place of assumed ones",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    parser.add_argument(
        "--top", type=count, default=10, metavar="N", help="topologies to list [10]; --json has all"
    )
    parser.add_argument(
        "--final-rank",
        type=count,
        metavar="R",
        help="rank of each linear after the switch [that of the run's parameter budget, else the largest "
        "that its ranks can reach]",
    )
    parser.add_argument(
        "--steps-per-epoch",
        type=count,
        metavar="N",
        help="optimizer steps of an epoch, for --switch-epochs [known for WikiText-103 and gpt2]",
    )
    arguments, flags = parser.parse_known_args(argv)
    arguments.flags = flags
    return arguments


Measure = Callable[[Config, Cluster], Mapping[str, float]]
"""Rates of this machine for a run, as entries of a cluster file."""


def run(given: argparse.Namespace, measure: Measure, *, other_starts: StartSettings = no_start) -> str:
    """The page, or JSON, for what `options` read.

    Args:
        measure: called for ``--measure``. other_starts: as for ``parse``.

    Raises:
        UserError: a faulty setting, or no topology on which the run could train.
    """
    launch = parse(
        [*given.flags, "--dry-run", "--cluster", given.cluster], world_size=1, other_starts=other_starts
    )
    rates: Mapping[str, float] = {}
    if given.measure:
        assert launch.cluster is not None, "--cluster is required"
        rates = measure(launch.config, launch.cluster)
        launch = replace(launch, cluster=with_rates(launch.cluster, rates))
    plan = make(launch, given, rates)
    return json.dumps(as_json(plan)) if given.json else page(plan, top=given.top)


def make(launch: Launch, given: argparse.Namespace, rates: Mapping[str, float]) -> Plan:
    """Every topology of the launch, ranked, and what is set beside the first."""
    config, cluster = launch.config, launch.cluster
    assert cluster is not None, "--cluster is required"
    vocab_size, _ = planned_vocabulary(config.data)
    pinned = pinned_by(given.flags)
    if config.training.recompute_granularity is not None:  # which no flag of the command takes back
        pinned = (*pinned, "recompute_granularity")
    every = candidates(config, cluster, vocab_size=vocab_size, pinned=pinned)
    found = [agreeing(one, launch.deepspeed_config) for one in every]
    legal = [one for one in found if isinstance(one, Candidate)]
    illegal = [one for one in found if isinstance(one, Illegal)]
    if not legal:
        with launch.naming_origins():
            check(config, world_size=cluster.world_size)
        raise UserError(
            f"no topology: {illegal[0].reason}; give another number of devices or --global-batch-size"
        )
    if config.training.global_batch_size is None:
        raise UserError(
            f"tensor_model_parallel_size = {config.parallel.tensor_model_parallel_size}: does not divide the "
            f"{cluster.world_size} devices, so the batch that the settings mean is not known; give "
            "--global-batch-size"
        )
    largest = smallest_dim(config)
    if given.final_rank is not None and given.final_rank > largest:
        raise UserError(
            f"--final-rank {given.final_rank}: the linears have rank {largest} at most; give no more"
        )
    size = legal[0].topology.vocab_size
    assumed = Assumed(size, given.final_rank or assumed_rank(config), given.steps_per_epoch)
    ranked = sorted((forecast(one, cluster, assumed) for one in legal), key=ranking)
    deepest = most_layers(config, cluster, assumed)
    if not ranked[0].fits:
        raise UserError(_lacking(ranked, cluster, deepest))
    return Plan(
        launch=launch,
        flags=tuple(given.flags),
        cluster=cluster,
        rates=rates,
        assumed=assumed,
        rank_is_assumed=given.final_rank is None,
        forecasts=ranked,
        illegal=illegal,
        methods=other_methods(ranked[0], cluster, assumed),
        break_even=break_even_rank(config),
        most_layers=deepest,
    )


def _lacking(forecasts: list[Forecast], cluster: Cluster, deepest: int | None) -> str:
    """That no topology fits: how near the nearest comes, and what would."""
    least = min(forecasts, key=lambda one: one.memory)
    found = settings_of(least.candidate.config).items()
    settings = ", ".join(f"{name} = {value}" for name, value in found if value is not None)
    if deepest and deepest >= least.candidate.config.model.num_layers:
        remedy = "leave the choice of more of these to the plan: on another topology the model fits"
    else:
        smaller = f" (of this width {deepest} layers fit)" if deepest else ""
        remedy = f"give more devices, or a smaller model{smaller}"
    plain = least.candidate.config.inrank.truncation == "plain"
    if not plain and all(fits(phase.memory, cluster) for phase in least.phases):
        remedy = f"its steps would fit, the switch would not: --truncation plain takes less; or {remedy}"
    return (
        f"none of {len(forecasts)} topologies fits into the {shown_size(cluster.memory or 0)} of each "
        f"{cluster.device}: the least is {shown_size(least.memory)} and the allocator's slack, with "
        f"{settings}; {remedy}"
    )


def pinned_by(flags: list[str]) -> tuple[str, ...]:
    """Dimensions that a flag of the command line gives. A configuration file's values pin nothing."""
    names = {kebab(word).partition("=")[0].removeprefix("--").removeprefix("no-") for word in flags}
    return tuple(name for name in DIMENSIONS if name.replace("_", "-") in names)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as one JSON object: times in seconds or hours, sizes in bytes."""
    methods: list[dict[str, Any]] = []
    for one in plan.methods:
        if isinstance(one, Forecast):
            methods.append(
                {"method": one.candidate.config.training.method, "rows": rows([one])} | total_row(one)
            )
        else:
            methods.append({"method": one[0], "illegal": one[1]})
    return {
        "cluster": {
            "nodes": plan.cluster.nodes,
            "devices": plan.cluster.devices,
            "device": plan.cluster.device,
            "measured": dict(plan.rates),
        },
        "assumed": vars(plan.assumed),
        "rows": rows(plan.forecasts),
        "illegal": illegal_rows(plan.illegal),
        "chosen": total_row(plan.forecasts[0]) | {"command": plan.command},
        "methods": methods,
        "break_even_rank": plan.break_even,
        "most_layers": plan.most_layers,
    }
