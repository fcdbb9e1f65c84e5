"""The runs of the InRank paper's tables: what it reports, what a plan predicts, what runs came to."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from inrank_megatron.config.checks import check
from inrank_megatron.config.cli import parse
from inrank_megatron.config.cluster import parse_cluster
from inrank_megatron.config.defaults import find_config
from inrank_megatron.config.loading import SIZES, flatten
from inrank_megatron.config.schema import Config
from inrank_megatron.config.topology import topology_of
from inrank_megatron.planning.forecast import Forecast, forecast
from inrank_megatron.planning.space import Candidate, changed
from inrank_megatron.planning.timeline import Assumed
from inrank_megatron.reporting.run import Run
from inrank_megatron.reporting.tables import peaks

VOCABULARY, GPUS = 50257, 8
A100 = "8xA100-80GB"
TOPOLOGY = {"tensor_model_parallel_size": 1, "zero_stage": 1, "offload_optimizer": False}
"""Of the predictions, with the micro-batch of the file and without recomputation."""
GB = 10**9
COMPARED = (
    *(*SIZES, "ffn_hidden_size", "hidden_dropout", "attention_dropout", "init_method_std", "optimizer"),
    *("factor_optimizer", "matrix_optimizer", "lr", "min_lr", "lr_decay_style", "lr_warmup_iters"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "factor_lr_multiplier"),
    *("method", "global_batch_size", "train_iters", "bf16", "fp16", "factorised_linears", "rank"),
    *("factor_init", "initial_rank", "buffer", "threshold", "rank_check_interval", "rank_check_start"),
    *("max_rank", "rank_criterion", "frozen_base", "switch_iters", "switch_epochs", "truncation"),
    *("dataset", "tokenizer"),
)
"""Settings that a run must have in common with a row of the tables; others change no result that is shown
there, or are those of the topology."""


@dataclass(frozen=True)
class Reported:
    """What the paper's tables 1 to 5 say of a run; None: nothing. ``hours`` on 8 GPUs, ``memory`` in GB,
    ``parameters`` in millions. Those of fixed ranks are not in table 2; the ranks are as of table 3.
    """

    perplexity: float
    rank: int | None
    hours: float | None
    memory: float | None
    parameters: float | None


@dataclass(frozen=True)
class PaperRun:
    """A row: ``tables`` that have it, the file of ``configs/paper`` and further flags, and the GPUs."""

    size: str
    what: str
    tables: str
    config: str
    flags: tuple[str, ...]
    cluster: str
    reported: Reported

    @property
    def name(self) -> str:
        return f"{self.size}, {self.what}"

    @property
    def command(self) -> str:
        """What launches it on 8 GPUs of a node."""
        words = ["--config", f"configs/paper/{self.config}.yaml", *self.flags]
        folder = "-".join([self.config, *(flag.lstrip("-") for flag in self.flags)])
        words += ["--save", f"runs/paper/{folder}"]
        return shlex.join(["deepspeed", "--num_gpus", str(GPUS), "launch/pretrain_gpt2.py", *words])

    @property
    def settings(self) -> Config:
        """Of a launch on 8 GPUs."""
        path = find_config(f"paper/{self.config}.yaml")
        return parse(["--config", str(path), *self.flags], world_size=GPUS).config


def _of_size(size: str, cluster: str, dense: Reported, fixed: float, grown: dict[float, Reported]):
    """The rows of tables 1 to 3; ``fixed``: perplexity in table 2; ``grown``: by threshold."""
    name, full = f"gpt2_{size}", grown[0.9]
    yield PaperRun(size, "full rank", "1, 3", f"{name}_dense", (), cluster, dense)
    own = Reported(fixed, full.rank, None, None, None)
    yield PaperRun(size, "fixed rank", "2", f"{name}_fixed_rank", (), cluster, own)
    for threshold, reported in grown.items():
        flags = () if threshold == 0.9 else ("--threshold", f"{threshold:g}")
        what, tables = f"InRank-Efficient, threshold {threshold:g}", "1, 2, 3" if threshold == 0.9 else "3"
        yield PaperRun(size, what, tables, f"{name}_inrank", flags, cluster, reported)


def _in_half(size: str, reported: Reported) -> PaperRun:
    what = "InRank-Efficient, threshold 0.9, FP16"
    return PaperRun(size, what, "5", f"gpt2_{size}_inrank", ("--fp16",), A100, reported)


RUNS = (
    *_of_size(
        "small",
        "8xV100-32GB",
        Reported(19.3, 768, 23.9, 27, 124),
        19.7,
        {
            0.8: Reported(20.2, 152, 18.3, 24.5, 81.8),
            0.85: Reported(19.9, 192, 18.8, 24.6, 85.5),
            0.9: Reported(19.6, 254, 19.1, 24.7, 91.2),
        },
    ),
    *_of_size(
        "medium",
        A100,
        Reported(20.6, 1024, 28.7, 73, 354),
        20.5,
        {
            0.8: Reported(21.0, 168, 16.8, 63.8, 194),
            0.85: Reported(20.4, 213, 17.4, 64.0, 205),
            0.9: Reported(20.2, 286, 18.0, 65.1, 223),
        },
    ),
    _in_half("medium", Reported(20.3, 286, 13.2, 40, 223)),
    *_of_size(
        "large",
        A100,
        Reported(20.9, 1280, 55.6, 71, 774),
        20.8,
        {
            0.8: Reported(21.3, 179, 32.7, 57.6, 384),
            0.85: Reported(20.8, 230, 33.7, 58.0, 408),
            0.9: Reported(20.4, 312, 34.6, 58.2, 445),
        },
    ),
    _in_half("large", Reported(20.5, 312, 25.1, 39, 445)),
)


def predicted(run: PaperRun, cluster: str | None = None, *, micro_batch_size: int | None = None) -> Forecast:
    """By the planner, at the paper's rank; ``cluster``: [the paper's GPUs]; of ``TOPOLOGY``."""
    config = run.settings
    config = changed(config, TOPOLOGY | {"micro_batch_size": micro_batch_size or _micro(config)})
    machines = parse_cluster(cluster or run.cluster)
    check(config, world_size=machines.world_size)
    topology = topology_of(config, world_size=machines.world_size, vocab_size=VOCABULARY)
    rank = run.reported.rank
    assert rank is not None, "every row has one"
    return forecast(Candidate(config, topology), machines, Assumed(VOCABULARY, rank))


def _micro(config: Config) -> int:
    return config.training.micro_batch_size


def hours_at_the_rate_of_full_rank(run: PaperRun) -> float:
    """Predicted hours times the published over the predicted ones of the full-rank run of its size and
    GPUs: what is left is how a method compares with full rank.
    """
    full = next(one for one in RUNS if one.size == run.size)
    assert full.reported.hours is not None, "table 1 has it"
    return predicted(run).hours * full.reported.hours / predicted(full).hours


def attained(run: PaperRun) -> float:
    """Operations per second of a GPU that the published hours mean, by the operations of the plan."""
    plan = predicted(run)
    assert run.reported.hours is not None, "asked for rows with hours alone"
    return sum(one.flops * one.phase.steps for one in plan.phases) / (run.reported.hours * 3600)


def micro_batch_of(run: PaperRun) -> tuple[int, float]:
    """The micro-batch at which predicted memory is closest to the published, and that memory in GB."""
    target = run.reported.memory
    assert target is not None, "asked for rows of table 1 alone"
    sizes = [2**n for n in range(7)]
    by_size = {size: predicted(run, micro_batch_size=size).memory / GB for size in sizes}
    best = min(by_size, key=lambda size: abs(by_size[size] - target))
    return best, by_size[best]


def rows(runs: Iterable[Run] = ()) -> tuple[list[dict[str, Any]], list[str]]:
    """One for each run of the tables, with what the first of ``runs`` that has its settings came to; and a
    remark for each of ``runs`` that is none of the tables', or has not finished.
    """
    found: dict[str, Run] = {}
    remarks = []
    for one in runs:
        row, why = _row_of(one)
        if row is None:
            remarks.append(f"{one.folder}: no run of the tables; {why}")
        elif not one.summary.get("finished"):
            remarks.append(f"{one.folder}: {row.name}, which has not finished; left out")
        elif row.name in found:
            remarks.append(f"{one.folder}: {row.name}, as {found[row.name].folder} already is; left out")
        else:
            found[row.name] = one
    return [_row(run, found.get(run.name)) for run in RUNS], remarks


@cache
def _compared(run: PaperRun) -> dict[str, Any]:
    flat = flatten(run.settings)
    return {name: flat[name] for name in COMPARED}


def _row_of(one: Run) -> tuple[PaperRun | None, str]:
    """The row whose settings a run has; None, and in what it differs from the nearest."""
    differing = {
        run: [name for name, value in _compared(run).items() if one.settings.get(name) != value]
        for run in RUNS
    }
    nearest = min(RUNS, key=lambda run: len(differing[run]))
    names = differing[nearest]
    if not names:
        return nearest, ""
    shown = ", ".join(f"{name} = {one.settings.get(name)}" for name in names[:3])
    more = f" and {len(names) - 3} others" if len(names) > 3 else ""
    return None, f"the nearest is {nearest.name}, from which it differs in {shown}{more}"


def _row(run: PaperRun, one: Run | None) -> dict[str, Any]:
    plan = predicted(run, A100)
    return {
        "run": run.name,
        "tables": run.tables,
        "parameters": plan.phases[-1].parameters.total,
        **{f"reported_{name}": value for name, value in vars(run.reported).items()},
        "predicted_hours": round(plan.hours, 1),
        "predicted_memory": round(plan.memory / GB, 1),
        **_measured(one),
        "command": run.command,
    }


def _measured(one: Run | None) -> dict[str, Any]:
    """Of a finished run, in the units of the paper's tables; None where it has no record."""
    names = ("perplexity", "rank", "hours", "memory", "parameters", "folder")
    values: tuple = (None,) * len(names)
    if one is not None:
        test, seconds = one.last_evaluation("test"), one.elapsed_seconds
        memory = max(peaks(one).values(), default=None)
        values = (
            None if test is None else round(test["perplexity"], 2),
            one.train[-1].get("mean_rank") if one.train else None,
            None if seconds is None else round(seconds / 3600, 2),
            None if memory is None else round(memory / GB, 1),
            one.last_cost("parameters"),
            str(one.folder),
        )
    return {f"measured_{name}": value for name, value in zip(names, values, strict=True)}
