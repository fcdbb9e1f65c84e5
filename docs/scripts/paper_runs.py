"""Writes the tables of ``docs/guides/paper_runs.md``: ``python docs/scripts/paper_runs.py``.

They follow from the paper's figures and from the planner; a test fails while the page is out of date.
"""

import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

from inrank_megatron.config.cli import parse
from inrank_megatron.config.cluster import parse_cluster
from inrank_megatron.config.topology import topology_of
from inrank_megatron.experiments import paper_runs as paper
from inrank_megatron.experiments.paper_runs import PaperRun
from inrank_megatron.planning.forecast import Forecast, forecast
from inrank_megatron.planning.space import Candidate
from inrank_megatron.planning.timeline import Assumed

_CONFIGS = runpy.run_path(str(Path(__file__).parent / "paper_configs.py"))
FOLDER, LLAMAS, TRAININGS, WARM_START = (
    _CONFIGS[name] for name in ("FOLDER", "LLAMAS", "TRAININGS", "WARM_START")
)
T5 = 32100
"""Tokens of T5's vocabulary."""
PAGE = Path(__file__).parents[1] / "guides" / "paper_runs.md"


def commands() -> Iterator[list[str]]:
    """What to type for each row, what it takes, what the paper reports, and who ran it."""
    yield [
        "run",
        "command",
        "hours",
        "parameters",
        "the paper: perplexity, hours, GB, parameters",
        "measured",
    ]
    for row in paper.rows()[0]:
        cells = [row["run"], f"`{row['command']}`", f"{row['predicted_hours']:.1f}", f"{row['parameters']:,}"]
        names = ("perplexity", "hours", "memory", "parameters")
        reported = [
            "-" if row[f"reported_{name}"] is None else f"{row[f'reported_{name}']:g}" for name in names
        ]
        reported[-1] += " M" if reported[-1] != "-" else ""
        yield [*cells, ", ".join(reported), ""]


def differences() -> Iterator[list[str]]:
    """Predictions on the paper's GPUs over what it reports, and what is left without the named terms."""
    head = ["run", "GPUs", "hours: plan / paper", "at the rate of full rank", "rate of products"]
    yield [*head, "GB: plan / paper", "micro-batch that fits", "GB: then / paper"]
    for run in paper.RUNS:
        if run.reported.hours is not None:
            yield _difference(run)


def relora() -> Iterator[list[str]]:
    """What ReLoRA's runs take, for each model at full rank and by ReLoRA with its warm start."""
    yield [
        "model",
        "parameters",
        "batch, tokens",
        "steps",
        "hours: full rank",
        "hours: warm start and ReLoRA",
    ]
    for model in LLAMAS:
        full, low = (_planned(f"llama_{model.size}_{name}.yaml") for name in TRAININGS)
        warm = full.phases[0].time.total * WARM_START / 3600
        yield [
            model.size.upper(),
            f"{full.phases[0].parameters.total:,}",
            f"{model.batch * model.length:,}",
            f"{model.steps:,}",
            f"{full.hours:.1f}",
            f"{warm + low.hours:.1f}",
        ]


def _planned(name: str) -> Forecast:
    config = parse(["--config", str(FOLDER / name)], world_size=paper.GPUS).config
    cluster = parse_cluster(paper.A100)
    topology = topology_of(config, world_size=cluster.world_size, vocab_size=T5)
    return forecast(Candidate(config, topology), cluster, Assumed(T5, config.inrank.rank or 1))


def _difference(run: PaperRun) -> list[str]:
    plan, reported = paper.predicted(run), run.reported
    assert reported.hours is not None and reported.memory is not None, "rows with hours have both"
    at_rate = paper.hours_at_the_rate_of_full_rank(run)
    # A rate is one of a precision, so a row in another one is not held against full rank in FP32.
    shown = "-" if run.flags == ("--fp16",) else f"{at_rate:.1f}: {_percent(at_rate / reported.hours)}"
    micro, memory = paper.micro_batch_of(run)
    planned = plan.memory / paper.GB
    return [
        run.name,
        run.cluster,
        f"{plan.hours:.1f} / {reported.hours:g}: {_percent(plan.hours / reported.hours)}",
        shown,
        f"{paper.attained(run) / 1e12:.0f} TFLOP/s",
        f"{planned:.1f} / {reported.memory:g}: {_percent(planned / reported.memory)}",
        str(micro),
        f"{memory:.1f}: {_percent(memory / reported.memory)}",
    ]


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.0f} %"


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "commands": commands,
    "differences": differences,
    "relora": relora,
}


def page(text: str) -> str:
    """The page with its tables as they are now."""
    for name, table in TABLES.items():
        head, *rows = (f"| {' | '.join(cells)} |" for cells in table())
        line = "|" + " --- |" * (head.count("|") - 1)
        block = "\n".join([f"<!-- {name}: python docs/scripts/paper_runs.py -->", "", head, line, *rows, ""])
        text, times = re.subn(
            rf"<!-- {name}: .*?(?=\n<!-- end -->)", lambda _, b=block: b, text, flags=re.DOTALL
        )
        assert times == 1, name
    return text


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
