"""``report.html``: one page with everything about a run, made from the files of its folder alone."""

import re
from pathlib import Path
from typing import NamedTuple

from inrank_megatron.errors import UserError
from inrank_megatron.reporting.behind import behind
from inrank_megatron.reporting.console import duration
from inrank_megatron.reporting.files import write_atomically
from inrank_megatron.reporting.glance import answers
from inrank_megatron.reporting.learnt import size, tells_of_words, verdict, yardsticks
from inrank_megatron.reporting.page import Picture, picture, png, render
from inrank_megatron.reporting.plots import figures
from inrank_megatron.reporting.run import Run, read_run
from inrank_megatron.reporting.tables import (
    Table,
    evaluation_table,
    median,
    notice_table,
    number,
    phase_table,
    rank_table,
    share,
    small_tables,
)

CAPTIONS = {
    "loss": (
        "Loss and perplexity",
        "Loss on the left, the same curves as perplexity on the right. Dashed: the switch from "
        "W0 + UV to U*V*, if there was one. Dotted: a unigram model on the validation tokens.",
    ),
    "ranks": ("Rank of every layer", "Rank at each check, coloured by the depth of the block."),
    "spectrum": (
        "Spectrum and the part explained",
        "Leading singular values, normalised by their sum, at the first (left) and last check (right), in "
        "the first and the last block. Solid: kept at the layer's rank.",
    ),
    "cost": (
        "Size and cost against the dense model",
        "Per cent of the dense model of the same shape.",
    ),
    "throughput": ("Throughput", "Tokens per second of the whole job, and what one device computes."),
}


class Tile(NamedTuple):
    """One figure of the headline."""

    name: str
    value: str
    note: str = ""


def write_report(run_dir: str | Path) -> Path:
    """Write ``plots/*.png`` and the self-contained ``report.html`` of a run; returns the page's path.

    Works on any run folder: dense or low-rank, finished or not, cut off in the middle of a line, or without
    records. Each file is replaced at once, so a reader never sees half of one.

    Raises:
        UserError: the folder does not exist or cannot be written, or its ``config.yaml`` or ``summary.json``
            cannot be parsed.
    """
    run = read_run(run_dir)
    try:
        return _write(run)
    except OSError as error:
        raise UserError(
            f"{error.filename2 or error.filename or run.folder}: the report cannot be written "
            f"({error.strerror}); correct that, then run tools/report.py"
        ) from None


def _write(run: Run) -> Path:
    page = render(
        title=f"{method_of(run)}: {run.folder.resolve().name}",
        lead=_lead(run),
        learnt="; ".join(part for part in (verdict(run), size(run)) if part),
        sample=run.sample
        and run.sample | {"text": re.sub(r"\n{3,}", "\n\n", str(run.sample.get("text", "")))},
        notice=unfinished(run) or _left_undone(run),
        answers={run.folder.resolve().name: answers(run)},
        tiles=_tiles(run),
        pictures=_pictures(run),
        tables=_tables(run),
    )
    path = run.folder / "report.html"
    write_atomically(path, page.encode())
    return path


def _pictures(run: Run) -> list[Picture]:
    """Those that the records allow, which are also written into ``plots/``."""
    plots = run.folder / "plots"
    plots.mkdir(exist_ok=True)
    pictures = []
    for name, figure in figures(run).items():
        image = png(figure)
        write_atomically(plots / f"{name}.png", image)
        (title, caption), (alt, table) = CAPTIONS[name], behind(run, name)
        pictures.append(picture(image, title=title, caption=caption, alt=alt, table=table))
    return pictures


def method_of(run: Run) -> str:
    """As the summary has it, or before there is one, the settings."""
    return str(run.summary.get("method") or run.settings.get("method") or "run")


def _lead(run: Run) -> str:
    total = run.settings.get("train_iters")
    steps = f"{run.last_step:,}" + (f" of {total:,}" if isinstance(total, int) else "") + " steps"
    tokens = f"{run.train[-1]['tokens']:,} tokens" if run.train and run.train[-1].get("tokens") else ""
    world = run.summary.get("world")
    shape = (
        f"{world['size']} x {world['device']}, tensor parallel {world['tensor_model_parallel_size']}, "
        f"data parallel {world['data_parallel_size']}"
        if world
        else ""
    )
    return "; ".join(part for part in (steps, tokens, shape) if part)


def unfinished(run: Run) -> str:
    """What to say of a run that is not at its end; empty for one that is."""
    # A finished run that was resumed with more steps still has the summary of its first part.
    if run.summary.get("finished") and run.summary.get("steps", 0) >= run.last_step:
        return ""
    return f"This run has not finished: its last recorded step is {run.last_step:,}."


def _left_undone(run: Run) -> str:
    left = run.summary.get("unfinished")
    return f"This run has all its steps; {left}." if left else ""


def _tiles(run: Run) -> list[Tile]:
    tiles = []
    for split, name in (("valid", "validation"), ("test", "test")):
        record = run.last_evaluation(split)
        if record:
            words, at = record.get("word_perplexity"), f"step {record['step']:,}"
            scale = yardsticks(run) if split == "valid" else ""
            tiles.append(Tile(f"{name} perplexity", number(record["perplexity"]), scale or at))
            if tells_of_words(words, run.summary.get("vocab_size")):
                tiles.append(Tile(f"{name} perplexity (word)", number(words), at))
    if run.ranks:
        last = [records[-1]["rank"] for records in run.ranks_by_layer().values()]
        note = f"{min(last)} to {max(last)} in {len(last)} layers"
        tiles.append(Tile("mean rank", f"{sum(last) / len(last):.1f}", note))
    tiles += [_cost_tile(run, "parameters", name="parameters")]
    tiles += [_cost_tile(run, "flops_per_token", name="FLOPs/token")]
    if run.elapsed_seconds is not None:
        tiles.append(Tile("training time", duration(run.elapsed_seconds), f"to step {run.last_step:,}"))
    rate = median(run.train, "tokens_per_second")
    if rate is not None:
        tiles.append(Tile("tokens/s", number(rate), "median over steps"))
    return [tile for tile in tiles if tile.value]


def _cost_tile(run: Run, key: str, *, name: str) -> Tile:
    """The last phase's cost, against the dense model's; without a value where unknown."""
    last, costs = run.last_cost(key), run.summary.get(key) or {}
    return Tile(name, number(last) if last else "", share(last, costs.get("dense")))


def _tables(run: Run) -> list[Table]:
    tables = (phase_table(run), evaluation_table(run), notice_table(run), rank_table(run), *small_tables(run))
    return [table for table in tables if table.rows]
