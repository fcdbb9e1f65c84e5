"""Several runs on one page: curves, ranks and costs side by side, from the files of their folders alone."""

import string
from collections.abc import Callable, Sequence
from pathlib import Path

from inrank_megatron.errors import UserError
from inrank_megatron.reporting.files import is_there, write_atomically
from inrank_megatron.reporting.glance import answers
from inrank_megatron.reporting.page import picture, png, render
from inrank_megatron.reporting.recorded import unigram_perplexity
from inrank_megatron.reporting.report import unfinished
from inrank_megatron.reporting.run import Run, read_run
from inrank_megatron.reporting.several_figures import several_figures
from inrank_megatron.reporting.several_tables import (
    cost_table,
    result_table,
    run_table,
    settings_table,
)

MOST_RUNS = 12  # that colours and lines tell apart
GENERATOR = "InRank-Megatron, several runs"
Runs = dict[str, Run]


def write_comparison(folders: Sequence[str | Path], output: Path) -> Path:
    """Write the self-contained page ``output``; returns its path. Nothing is written into the runs.

    Runs are called A, B, C, ... in the order of ``folders``. A page that this function has written before is
    replaced, at once; no other file is.

    Raises:
        UserError: a folder is no run, has no record of a step, is named twice or cannot be read, there are
            more than ``MOST_RUNS``, or ``output`` cannot be written or is another file.
    """
    runs = read_runs(folders)
    _check_output(output)
    page = render(
        title=f"{len(runs)} runs side by side",
        lead="; ".join(f"{name}: {title}" for name, title in titles(runs).items()),
        notice=" ".join([*_unfinished(runs), *not_comparable(runs)]),
        answers={name: answers(run) for name, run in runs.items()},
        pictures=[
            picture(
                png(shown.figure), title=shown.title, caption=shown.caption, alt=shown.alt, table=shown.table
            )
            for shown in several_figures(runs)
        ],
        tables=[make(runs) for make in (run_table, result_table, cost_table, settings_table)],
        generator=GENERATOR,
    )
    try:
        write_atomically(output, page.encode())
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); give another --output") from None
    return output


def titles(runs: Runs) -> dict[str, str]:
    """Of each run the name of its folder; the whole path where another one has the same name."""
    folders = {name: run.folder.resolve() for name, run in runs.items()}
    names = [folder.name for folder in folders.values()]
    return {
        name: folder.name if names.count(folder.name) == 1 else str(folder)
        for name, folder in folders.items()
    }


def read_runs(folders: Sequence[str | Path]) -> Runs:
    """The runs by their letters. Raises UserError as :func:`write_comparison`."""
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs: a page shows at most {MOST_RUNS}; name fewer")
    runs: Runs = {}
    for letter, folder in zip(string.ascii_uppercase, folders, strict=False):
        run = read_run(folder)
        if not (run.folder / "config.yaml").is_file():
            raise UserError(
                f"{folder}: not a run folder, it has no config.yaml; name folders given to --save"
            )
        if not run.train:
            raise UserError(f"{folder}: its metrics.jsonl has no step yet; name a run that has trained")
        for other in runs.values():
            if other.folder.resolve() == run.folder.resolve():
                raise UserError(f"{folder}: is named twice; name each run once")
        runs[letter] = run
    return runs


def _check_output(output: Path) -> None:
    """Before figures are drawn; what is there is replaced only if it is such a page."""
    if output.is_dir():
        raise UserError(f"{output}: is a folder; give a file as --output")
    if is_there(output) and GENERATOR.encode() not in _head(output):
        raise UserError(f"{output}: exists and is no page of several runs; give another --output")
    if not output.resolve().parent.is_dir():
        raise UserError(f"{output}: its folder does not exist; make it or give another --output")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1000)


def _unfinished(runs: Runs) -> list[str]:
    return [f"{name} has not finished." for name, run in runs.items() if unfinished(run)]


def not_comparable(runs: Runs) -> list[str]:
    """Sentences about what must not be compared between these runs, as far as their records say so."""
    reasons: tuple[tuple[str, Callable[[Run], object]], ...] = (
        ("vocabularies", lambda run: run.summary.get("vocab_size")),
        ("validation texts (perplexities of a unigram model)", unigram_perplexity),
        ("sequence lengths", lambda run: run.settings.get("seq_length")),
    )
    found = [text for what, value in reasons if (text := _differing(runs, what, value))]
    said = [f"Losses and perplexities are not comparable: {'; '.join(found)}."] if found else []
    if where := _differing(runs, "processes or devices", _world):
        said.append(f"Times, memory and tokens/s are not comparable: {where}.")
    return said


def _differing(runs: Runs, what: str, value: Callable[[Run], object]) -> str:
    """``different vocabularies (A 4096, B 8192)``; empty where all that are known are alike."""
    known = {name: _shown(found) for name, run in runs.items() if (found := value(run)) is not None}
    if len(set(known.values())) < 2:
        return ""
    return f"different {what} ({', '.join(f'{name} {shown}' for name, shown in known.items())})"


def _shown(value: object) -> str:
    return f"{value:,.6g}" if isinstance(value, int | float) else str(value)


def _world(run: Run) -> str | None:
    world = run.summary.get("world")
    return f"{world['size']} x {world['device']}" if world else None
