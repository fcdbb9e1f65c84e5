"""What is under way before training begins: one live line on a terminal, else a line for each slow stage."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

QUIET_SECONDS = 5  # without a terminal, nothing is said of what is done by then


@contextmanager
def shown(console: Console) -> Iterator[Callable[[str, int | None], None]]:
    """A callback ``(stage, tokens)``; ``tokens``: done so far, where known."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task("reading the sources", total=None)
        stages: set[str] = set()
        began = time.monotonic()

        def progress(stage: str, tokens: int | None) -> None:
            done = "" if tokens is None else f": {tokens:,} tokens"
            display.update(task, description=f"{stage}{done}")
            slow = time.monotonic() - began > QUIET_SECONDS
            if not console.is_terminal and slow and stage not in stages:
                stages.add(stage)
                print(stage, flush=True)

        yield progress
