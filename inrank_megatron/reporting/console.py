"""The progress display of rank 0: a live display in a terminal, plain lines anywhere else."""

import errno
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import rich.console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PHASE_NAMES = {0: "dense", 1: "phase 1", 2: "phase 2"}
ETA_WINDOW = 50


class Console:
    """Shows a run's progress; use it as a context manager.

    In a terminal a bar and the newest figures stay at the bottom and messages scroll above them. When the
    output is a file or a pipe, each call prints one line. The cursor is never hidden and the display needs no
    thread, so that even a killed process leaves the terminal as it was.

    Args:
        total_steps: optimizer steps of the whole run.
        start_step: steps that were complete before this process started (a resumed run).
    """

    def __init__(self, total_steps: int, *, start_step: int = 0):
        self._total_steps = total_steps
        self._start_step = start_step
        self._times: deque[tuple[int, float]] = deque(maxlen=ETA_WINDOW)
        self._terminal = rich.console.Console(highlight=False, markup=False)
        self._live: Live | None = None

    def __enter__(self) -> "Console":
        self._times.append((self._start_step, time.monotonic()))
        if sys.stdout.isatty() and not self._terminal.is_dumb_terminal:
            self._live = Live(console=self._terminal, auto_refresh=False, vertical_overflow="visible")
            self._live.start()
            self._terminal.show_cursor(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def step(self, record: dict[str, Any]) -> None:
        """Show one ``train`` record of ``metrics.jsonl``; needed are ``step``, ``phase``, ``loss``,
        ``perplexity``, ``lr`` and ``tokens_per_second``; the others are left out where absent or None.
        """
        step = record["step"]
        self._times.append((step, time.monotonic()))
        counter, figures, eta = f"step {step}/{self._total_steps}", _figures(record), f"eta {self._eta()}"
        if self._live is None:
            print(" | ".join([counter, *figures, eta]), flush=True)
            return
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(counter, ProgressBar(total=self._total_steps, completed=step), eta)
        self._live.update(rich.console.Group(bar, Text(" | ".join(figures))), refresh=True)

    def message(self, text: str) -> None:
        """Print ``text`` as it is, above the live display where there is one."""
        if self._live is None:
            print(text, flush=True)
        else:
            self._terminal.print(text)

    def _eta(self) -> str:
        """Time left at the pace of the last ``ETA_WINDOW`` calls: phases differ in speed."""
        (first_step, first_time), (step, now) = self._times[0], self._times[-1]
        seconds = (self._total_steps - step) * (now - first_time) / max(step - first_step, 1)
        return duration(seconds)


@contextmanager
def unless_nobody_reads() -> Iterator[None]:
    """Continue without output when its reader has ended, as behind `head`, after an interrupt that ended
    `tee` too, or when the terminal was closed. For code that prints and does nothing else.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):  # of a pipe, of a terminal
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def duration(seconds: float) -> str:
    """``1:23`` (minutes and seconds) or ``2:01:23`` (with hours)."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _figures(record: dict[str, Any]) -> list[str]:
    figures = [
        PHASE_NAMES[record["phase"]],
        f"loss {record['loss']:.3f}",
        f"ppl {record['perplexity']:,.1f}",
        f"lr {record['lr']:.1e}",
    ]
    if record.get("grad_norm") is not None:
        figures.append(f"grad norm {record['grad_norm']:.2f}")
    on_gpu = record.get("max_memory_allocated") is not None
    each = f" ({record['tokens_per_second_per_device']:,.0f} a GPU)" if on_gpu else ""
    figures.append(f"{record['tokens_per_second']:,.0f} tokens/s{each}")
    if record.get("tflops_per_second") is not None:
        share = "" if record.get("utilisation") is None else f" ({record['utilisation']:.0%} of peak)"
        figures.append(f"{record['tflops_per_second']:.3g} TFLOP/s{share}")
    if on_gpu:
        figures.append(f"peak {record['max_memory_allocated'] / 2**30:.1f} GiB")
    if record.get("mean_rank") is not None:
        figures.append(f"mean rank {record['mean_rank']:.1f}")
    if record.get("straggler_rank") is not None:
        figures.append(f"rank {record['straggler_rank']} {record['straggler_factor']:.1f}x slower")
    return figures
